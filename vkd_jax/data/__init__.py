"""From examples to batches of fixed shapes.

    processor       tokenizer, image processor and chat template of a model folder
    chat_template   which template of a model folder counts, and what a prompt must be
    images          decoding; the images of a set, packed as the model takes them
    encoding        `EncodedSet`, a set as arrays, and `Batch`, what one step reads
    sampler         the rows of each step, a function of (seed, name, step)
    augment         randomly transformed copies of a set's images

Contract: the package knows no family of models. A model's config offers the methods of `models.base.ModelConfig` about
images (`image_tokens`, `extract_images`, `pack`, `image_markup`, `pixel_limits`, ...), and everything else
follows from the model folder. To add another way of preparing a set, write a function that takes an `EncodedSet` and
returns one, as `augment.augment_set` does.
"""
