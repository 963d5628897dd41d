"""What a step takes on a slice of TPUs, from the compiler alone."""
