"""The tokenizer, image processor and chat template of a Hugging Face folder, without PyTorch and torchvision.

prompt = chat template(question, with or without images); the image token is repeated once per image feature
"""

import copy
import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vkd_jax.data import image_settings, image_sizes, tokenizer_checks
from vkd_jax.data.chat_template import read_chat_template
from vkd_jax.data.images import TiledImage, open_image
from vkd_jax.messages import listed
from vkd_jax.runtime import files, json_files, memory, storage
from vkd_jax.types import UserError, located

CONFIGS = (  # of a model folder, which transformers reads
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
PIXEL_SETTINGS = {"image_mean": (-255.0, 255.0), "image_std": (1e-3, 255.0), "rescale_factor": (1e-6, 10.0)}  # ranges
MAX_PIXELS = 256 * 28 * 28  # of an image, for families whose images differ in size: 256 image tokens of Qwen2-VL
LLAVA_CHAT_TEMPLATE = (  # as published with LLaVA-1.5
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Processor:
    """The tokenizer, image processor and chat template of a model folder.

    The image processor is transformers' PIL backend, which needs neither PyTorch nor torchvision. The image tokens are
    inserted here, since transformers' joint processors of some families need both.

    Args:
        folder: the model folder.
        config: the model's configuration, which defines how its images are laid out.
        max_pixels: the largest number of pixels of an image, for families whose images differ in size; 0 leaves the
            image processor's own limit.

    Raises:
        UserError: the folder lacks a file, or the model does not support `max_pixels`.

    Example:
        >>> processor = Processor(folder, config)
        >>> prompt_ids, answer_ids = processor.encode("Who is this?", "Mara Lindt", [processor.image(png)])
    """

    soft_tokens = 0  # image tokens before those of each image, which stand for learned embeddings

    def __init__(self, folder: str | Path, config: Any, *, max_pixels: int = 0):
        import transformers  # slow to import, and an EncodedSet does not need it

        folder = Path(folder)
        options = dict(local_files_only=True)
        _check_files(folder)
        image_settings.check(folder)
        try:
            with tokenizer_checks.panics_as_errors():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
                # With the configuration, an image processor of a class that is gone, such as
                # Qwen2_5_VLImageProcessor, is replaced by that of the model type.
                is_model = (folder / storage.MODEL_MARKER).is_file()
                hf_config = transformers.AutoConfig.from_pretrained(str(folder), **options) if is_model else None
                self.image_processor = transformers.AutoImageProcessor.from_pretrained(
                    str(folder), backend="pil", config=hf_config, **options
                )
                # Raises if it has settings of other types than transformers expects.
                texts = self.tokenizer(["Who is this?", "Why is that?"])["input_ids"]
        except Exception as error:  # tokenizers raises errors without a type of their own
            tokenizer_checks.check_encoding(folder)
            remedy = "copy tokenizer.json, tokenizer_config.json and preprocessor_config.json of the model there"
            if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
                remedy = (
                    "its tokenizer.model is not read: copy the model's tokenizer.json there, or write one with "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) where sentencepiece is installed"
                )
            raise UserError(
                f"{folder}: no usable tokenizer and image processor ({storage.first_line(error)[:150]}); {remedy}."
            ) from error
        if texts[0] == texts[1]:
            raise UserError(f"{folder}: its tokenizer reads different texts as the same tokens; get its files again.")
        tokenizer_checks.check(self.tokenizer, folder)
        self.folder, self.config = folder, config
        self._check_image_processor()
        if max_pixels:
            self.limit_pixels(max_pixels)
        self.image_token_id = config.image_token_id
        self.image_token = self._image_token(config.image_token_id)
        self.placeholder = self._image_token(config.placeholder_id)
        if missing := [token for token in config.markup_tokens if token not in self.tokenizer.get_vocab()]:
            raise UserError(
                f"{folder}: its tokenizer lacks {listed(missing)}, which marks images; get the files of the tokenizer "
                "again."
            )
        self._special_tokens = _special_tokens(self.tokenizer)
        self.eos_ids = _eos_ids(folder, self.tokenizer)
        self.pad_id = int(self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
        for token in {self.image_token_id, config.placeholder_id} & {*self.eos_ids, self.pad_id}:
            raise UserError(
                f"{folder}: the image token {token} of config.json also ends or pads answers; get the files of the "
                "tokenizer, generation_config.json and config.json again."
            )
        self.chat_template = read_chat_template(folder, self.tokenizer)
        self._check_chat_template()
        self.eos_ids = self._sorted_eos_ids()

    def _image_token(self, token: int) -> str:
        """The text of a token that marks images.

        Raises:
            UserError: the tokenizer lacks the token.
        """
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:
            raise UserError(f"{self.folder}: the image token {token} of config.json is not in the tokenizer.")
        if token not in self.tokenizer.added_tokens_decoder:
            raise UserError(
                f"{self.folder}: the image token {token} of config.json is {text!r:.40}, which texts are made of; get "
                "config.json or the files of the tokenizer again."
            )
        return text

    def _check_chat_template(self) -> None:
        """Renders a question: an error of the template shows here, not after hours of training.

        Raises:
            UserError: the folder has no chat template, or it does not render a prompt.
        """
        question, prompts = "Who is this?", []
        for images in (0, 1):
            with memory.growth_limit(memory.GIB):
                prompts.append(self.prompt(question, images))
        if self.chat_template is not None:
            ends = self.tokenizer.convert_ids_to_tokens(list(self.eos_ids))
            self.chat_template.warn_of_unannounced_answer(prompts[0].rpartition(question)[2], ends)

    def _sorted_eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; the one that the chat template writes after an answer is the first."""
        answer = "Mara Lindt"
        try:
            _, separator, rest = self.prompt("Who else?", 0, [("Who is this?", answer, 0)]).partition(answer)
        except UserError:  # a template for single questions
            return self.eos_ids
        ids = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if separator else []
        return tuple(sorted(self.eos_ids, key=lambda token: token != ids[0])) if ids else self.eos_ids

    def _check_image_processor(self) -> None:
        """Checks the sizes of the image processor, that the model fits it, and that it gives finite pixels."""
        path = image_settings.file_of(self.folder)
        with located(os.fspath(path)):
            problem = image_settings.class_problem(self.image_processor, self.config.image_processors)
            problem = problem or image_sizes.processor_problem(self.image_processor, self.config.edges_are_areas)
            if problem := problem or self.config.image_processor_problem(self.image_processor):
                raise UserError(f"{problem}.")
        joint = self.folder / image_settings.PROCESSOR
        settings = json_files.read_json(joint, remedy="get it again") if joint.is_file() else {}
        for name, value in self.config.processor_fields.items():
            actual = settings.get(name)
            if actual is not None and (type(actual) is not type(value) or actual != value):
                raise UserError(
                    f"{joint}: {name} is {actual!r:.40}, with which transformers inserts another number of image "
                    f"tokens than the model of config.json has; it has to be {value!r}: get both files again."
                )
        for name, (least, most) in PIXEL_SETTINGS.items():
            value = getattr(self.image_processor, name, 1.0)
            value = 1.0 if value is None and name == "rescale_factor" else value
            try:
                values = np.atleast_1d(np.asarray(value, np.float64))
            except (TypeError, ValueError):
                values = np.array([np.nan])
            if not ((values >= least) & (values <= most)).all():  # NaN is refused
                raise UserError(
                    f"{path}: the image processor has {name}={value!r}, which makes pixels infinite or all "
                    f"alike ({least:g} to {most:g} are allowed); copy preprocessor_config.json of the model there."
                )
        if problem := image_settings.range_problem(self.image_processor):
            raise UserError(f"{path}: {problem}; copy preprocessor_config.json of the model there.")

    def with_soft_tokens(self, count: int) -> "Processor":
        """Returns a copy that puts `count` further image tokens before those of each image."""
        processor = copy.copy(self)
        processor.soft_tokens = count
        return processor

    @property
    def max_pixels(self) -> int | None:
        """The largest number of pixels of an image; None if all images have one size."""
        limits = self.config.pixel_limits(self.image_processor)
        return None if limits is None else limits[1]

    def limit_pixels(self, max_pixels: int, name: str = "model.max_pixels") -> None:
        """Lowers the largest number of pixels of an image; larger images are shrunk to it.

        Raises:
            UserError: all images of the model have one size, or its smallest image has more pixels.
        """
        limits = self.config.pixel_limits(self.image_processor)
        if limits is None:
            raise UserError(f"{name}={max_pixels}: all images of {self.folder} have one size; set it to 0.")
        smallest, largest = limits
        if max_pixels < smallest:
            raise UserError(f"{name}={max_pixels}: the model needs at least {smallest}.")
        self.config.limit_pixels(self.image_processor, min(max_pixels, largest))

    def image(self, image: bytes | Image.Image) -> np.ndarray | TiledImage:
        """Resizes, crops and normalizes an image as the model expects it.

        Returns:
            float32 [height, width, 3], or the views of an image that the model reads as tiles.

        Raises:
            UserError: the image cannot be read, or the image processor does not support its shape.
        """
        try:
            image = open_image(image)
            image_sizes.check_shape(self.image_processor, image.width, image.height)
            options = self.config.image_processor_options
            output = self.image_processor(images=[image], do_convert_rgb=True, return_tensors="np", **options)
            output.setdefault("image_sizes", [(image.height, image.width)])  # of which some image processors return it
            return self.config.extract_images(output)[0]
        except (ValueError, OSError, UserError) as error:  # corrupt, unsupported, or resized for another model
            size = "" if isinstance(image, bytes) else f" of {image.width} x {image.height} pixels"
            raise UserError(f"an image{size} cannot be processed: {error}.") from error

    def named_images(self, images: Sequence[bytes | Image.Image], names: Sequence[str]) -> Callable[[int], Any]:
        """A function from a row number to that image, processed; its errors begin with the name of the image."""

        def make(row: int) -> np.ndarray | TiledImage:
            with located(names[row]):
                return self.image(images[row])

        return make

    def prompt(self, question: str, images: int, turns: Sequence[tuple[str, str, int]] = ()) -> str:
        """Formats a question as the text that precedes the answer, with the placeholder of each image.

        Args:
            question: the question.
            images: the number of images of the question.
            turns: earlier turns of the conversation: question, answer, number of images.

        Raises:
            UserError: the folder has no chat template, or it does not render a prompt.
        """
        if self.chat_template is None and not self.config.has_default_template:
            raise UserError("the model has no chat template; copy its chat_template.json or .jinja into the folder.")
        if self.chat_template is None:  # LLaVA-1.5's template, which its first releases lacked
            closed = [(text, f" {answer}{self.tokenizer.eos_token}", count) for text, answer, count in turns]
            return "".join(
                "USER: " + f"{self.image_token}\n" * count + f"{text} ASSISTANT:{answer}"
                for text, answer, count in [*closed, (question, "", images)]
            )
        messages = []
        for text, answer, count in [*turns, (question, None, images)]:
            content = [{"type": "image"}] * count + [{"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.chat_template.render(self.tokenizer, messages)

    def encode(
        self,
        question: str,
        answer: str | None,
        images: Sequence[np.ndarray] = (),
        turns: Sequence[tuple[str, str, int]] = (),
    ) -> tuple[list[int], list[int]]:
        """Tokenizes a question and its answer.

        Both come from one tokenization, split at the character where the answer begins, since a tokenizer may join
        characters across the boundary. The placeholder of an image becomes the model's markup for an image of its size,
        in which image tokens are repeated, one for each feature.

        Args:
            question: the question.
            answer: the answer; None for the prompt alone.
            images: the images in order, those of `turns` first; only their shapes matter.
            turns: earlier turns of the conversation, see `prompt`.

        Returns:
            The token ids of the prompt, and those of the answer with its end-of-sequence token ([] without an answer).

        Raises:
            UserError: the tokenizer joins the prompt with the answer, or the prompt contains another image token.
        """
        return self.encode_each(question, [answer], images, turns)[0]

    def check_text(self, text: str) -> None:
        """Checks that a text of a question or an answer has no token with a meaning of its own.

        Raises:
            UserError: it contains an image token or a special token, or is not Unicode.
        """
        if problem := json_files.text_problem(text):
            raise UserError(f"the text {ascii(text[:40])} {problem}; correct it.")
        for token in (self.placeholder, self.image_token):
            if token in text:
                raise UserError(
                    f"a text contains {token}, which stands for an image; remove it from the text. The chat "
                    "template inserts it."
                )
        if match := self._special_tokens.search(text):
            raise UserError(
                f"a text contains {match[0]}, a special token of the tokenizer; remove it from the text. What the "
                "model requires is added to each question and answer."
            )

    def encode_each(
        self,
        question: str,
        answers: Sequence[str | None],
        images: Sequence[np.ndarray] = (),
        turns: Sequence[tuple[str, str, int]] = (),
    ) -> list[tuple[list[int], list[int]]]:
        """Tokenizes one question with each of several answers, see `encode`."""
        for text in (question, *filter(None, answers), *(text for turn in turns for text in turn[:2])):
            self.check_text(text)
        prompt = self.prompt(question, len(images) - sum(count for *_, count in turns), turns)
        prompt, counts = self._insert_markup(prompt, images)
        space = "" if prompt[-1:].isspace() else " "
        texts = [prompt if answer is None else f"{prompt}{space}{answer}" for answer in answers]
        bos = self.tokenizer.bos_token  # some templates write it, and the tokenizer would add a second one
        add_special_tokens = not (bos and prompt.startswith(bos))
        ids, offsets = tokenizer_checks.encode(self.tokenizer, self.folder, texts, add_special_tokens)
        rows = [self._split(len(prompt), *row, counts) for row in zip(answers, ids, offsets, strict=True)]
        tokenizer_checks.check_answers(self.tokenizer, self.folder, answers, [row[1] for row in rows])
        for answer, text, tokens in zip(answers, texts, ids, strict=True):
            text = self._special_tokens.sub("", text)
            tokenizer_checks.check_round_trip(self.tokenizer, self.folder, tokens, text, (question, answer or ""))
        return rows

    def _insert_markup(self, prompt: str, images: Sequence[np.ndarray]) -> tuple[str, list[int]]:
        """Replaces the placeholder of each image by its markup, and counts the tokens of each image token in it."""
        first, *rest = prompt.split(self.placeholder)
        if len(rest) != len(images):
            raise self._other_count(self.placeholder, len(rest), len(images))
        before, after = self.config.template_frame
        if not all(text.endswith(before) for text in (first, *rest)[:-1]) or not all(x.startswith(after) for x in rest):
            raise UserError(
                f"the chat template does not write {before}{self.placeholder}{after} for an image, as the model was "
                "trained with; use the chat template of the model."
            )
        texts, counts = [first], []
        for image, text in zip(images, rest, strict=True):
            height, width = image.shape[:2]
            markup = self.config.image_markup(self._image_token, height, width)
            repeats = markup.count(self.image_token)
            of_image = [self.config.image_tokens(height, width) // repeats] * repeats
            of_image[0] += self.soft_tokens
            texts += [markup, text]
            counts += of_image
        return "".join(texts), counts

    @staticmethod
    def _other_count(token: str, found: int, expected: int) -> UserError:
        return UserError(
            f"the prompt contains {token} {found} times for {expected} images: remove it from the question, or use the "
            "model's own chat template."
        )

    def _split(
        self, end: int, answer: str | None, ids: list[int], offsets: list[tuple[int, int]], counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Splits token ids after the prompt's `end` characters and repeats each image token as `counts` says."""
        boundary = next((i for i, (_, last) in enumerate(offsets) if last > end), len(ids))
        if boundary < len(ids) and offsets[boundary][0] < end:
            raise UserError(
                f"the tokenizer joins the end of the prompt with the answer {answer!r}; change the chat template."
            )
        if (largest := max(ids, default=0)) >= (vocab := self.config.text.vocab):
            raise UserError(
                f"the tokenizer has a token {largest}, and the model knows those below {vocab}; get the files of the "
                "tokenizer again."
            )
        prompt_ids, answer_ids = ids[:boundary], ids[boundary:]
        if (image_tokens := prompt_ids.count(self.image_token_id)) != len(counts):
            raise self._other_count(self.image_token, image_tokens, len(counts))
        if len(prompt_ids) < 2:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens asks nothing: use the chat template of the model's processor."
            )
        if answer is not None and (not answer_ids or answer_ids[-1] not in self.eos_ids):
            answer_ids = [*answer_ids, self.eos_ids[0]]
        if answer is None and prompt_ids and prompt_ids[-1] in self.eos_ids:
            prompt_ids = prompt_ids[:-1]
        expanded: list[int] = []
        remaining = iter(counts)
        for token in prompt_ids:
            expanded.extend([token] * (next(remaining) if token == self.image_token_id else 1))
        return expanded, answer_ids


def _special_tokens(tokenizer: Any) -> re.Pattern:
    """What finds a special token in a text; the tokenizer would read it as that token, such as the end of an answer."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's first, then those of the model's generation config."""
    path = folder / "generation_config.json"
    more = json_files.read_json(path).get("eos_token_id") if path.is_file() else None
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(type(i) is int and 0 <= i < len(tokenizer) for i in more):
        raise UserError(f"{path}: eos_token_id is not a token of the tokenizer or a list of them; get the file again.")
    if words := [i for i in more if i not in tokenizer.added_tokens_decoder]:
        raise UserError(
            f"{path}: eos_token_id {words[0]} is {tokenizer.convert_ids_to_tokens(words[0])!r:.40}, which texts are "
            "made of, so answers would end before it; get the file again."
        )
    ids = tuple(dict.fromkeys([*([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]), *more]))
    if not ids:
        raise UserError(f"{folder}: neither its tokenizer nor its generation_config.json has an eos_token_id.")
    return ids


def _check_files(folder: Path) -> None:
    """Checks the files that transformers will open: their kind, and the JSON of the small ones."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in storage.MODEL_FILES):
            with files.reading(path):
                files.check_regular(path, None)
    for name in CONFIGS:
        if (folder / name).is_file():
            json_files.read_json(folder / name, remedy="get it again")


def create_processor(folder: str | Path, corpus: Sequence[str], *, vocab_size: int, image_size: int, patch_size: int):
    """Trains a byte-level BPE tokenizer and saves it as a LLaVA processor.

    Args:
        folder: the folder to write to.
        corpus: the texts to train the tokenizer on.
        vocab_size: the largest number of tokens, including the 256 bytes and the special tokens.
        image_size: the side of the model's images in pixels.
        patch_size: the side of a patch in pixels.

    Returns:
        The tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT_TEMPLATE,
    )
    processor.save_pretrained(str(folder))
    return tokenizer
