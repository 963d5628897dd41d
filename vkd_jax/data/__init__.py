"""From examples to fixed-shape batches: processor, encoded sets, image decoding, sampling and augmentation."""
