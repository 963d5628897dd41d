"""Folders of small random models in the published layout of each family; LLaVA's is `tiny_folder` of conftest.py."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vkd_jax.benchmarks.synthetic import people
from vkd_jax.checkpoints import hf
from vkd_jax.models import module_for

PIXELS = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255)
TEXT = dict(hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)

QWEN_TEMPLATE = (  # the published template without videos
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = (  # the published template without tools and videos
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for content in message.content -%}"
    "{%- if content.type == 'image' or 'image' in content -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in content -%}{{ content.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
GEMMA_TEMPLATE = (  # the published template without system messages
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
SMOLVLM_TEMPLATE = (  # as published
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL_TEMPLATE = (  # as published
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)

LLAVA_NEXT_TEMPLATE = (  # as published with Mistral, without system messages
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
VIPLLAVA_TEMPLATE = (  # the roles of the published prompts, without their first sentence
    "{% for message in messages %}{{ '###Human: ' if message['role'] == 'user' else '###Assistant: ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between the folders of families."""

    special_tokens: tuple[str, ...]
    roles: Mapping[str, str]  # of special tokens, as arguments of the tokenizer
    first_ids: bool  # whether the special tokens have the first ids, or the last
    end_ids: tuple[str, ...]  # `eos_token_id` of generation_config.json
    template: str
    config: Callable[[Mapping[str, int], int], dict[str, Any]]  # of the ids of special tokens and the vocabulary size
    image_processor: Mapping[str, Any]
    extra_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # processor_config.json, if there is one


def qwen_config(vision: Mapping[str, Any]) -> Callable[[Mapping[str, int], int], dict[str, Any]]:
    """The fields of config.json, without a nested text_config, as published."""
    towers = dict(depth=2, num_heads=4, in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)

    def config(ids, vocab):
        return dict(
            vision_config=towers | vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            vocab_size=vocab, num_hidden_layers=2, max_position_embeddings=512, rope_theta=1e6,
            rope_scaling=dict(type="mrope", mrope_section=[2, 2, 2]), tie_word_embeddings=True,
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], **TEXT,
        )  # fmt: skip

    return config


def qwen3_config(ids, vocab):
    """A grid of 6 x 6 positions; the features of two vision blocks enter the first two of three decoder blocks."""
    return dict(
        vision_config=dict(
            model_type="qwen3_vl", depth=3, num_heads=4, hidden_size=32, intermediate_size=40, out_hidden_size=48,
            patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
        ),
        text_config=dict(
            model_type="qwen3_vl_text", vocab_size=vocab, num_hidden_layers=3, max_position_embeddings=512, head_dim=16,
            rope_theta=5e6, rope_scaling=dict(rope_type="default", mrope_interleaved=True, mrope_section=[4, 2, 2]),
            tie_word_embeddings=True, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], **TEXT,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip


def gemma_config(ids, vocab):
    """Local, global and local attention; seven patches a side, pooled two by two."""
    return dict(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, image_size=28, patch_size=4, vision_use_head=False,
        ),
        text_config=dict(
            model_type="gemma3_text", vocab_size=vocab, num_hidden_layers=3, max_position_embeddings=512, head_dim=10,
            query_pre_attn_scalar=12, sliding_window=16, sliding_window_pattern=2,
            rope_scaling=dict(factor=8.0, rope_type="linear"), **TEXT,
        ),
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"], mm_tokens_per_image=9,
        eos_token_id=[ids["<eos>"], ids["<end_of_turn>"]],
    )  # fmt: skip


def smolvlm_config(tied: bool) -> Callable[[Mapping[str, int], int], dict[str, Any]]:
    """Four patches a side, joined two by two."""

    def config(ids, vocab):
        return dict(
            vision_config=dict(
                hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                patch_size=7,
            ),
            text_config=dict(
                model_type="llama", vocab_size=vocab, num_hidden_layers=2, max_position_embeddings=512,
                rope_theta=1e5, pad_token_id=ids["<|im_end|>"], tie_word_embeddings=tied, **TEXT,
            ),
            image_token_id=ids["<image>"], scale_factor=2, tie_word_embeddings=tied,
        )  # fmt: skip

    return config


def internvl_config(ids, vocab):
    """Four patches a side, joined two by two."""
    return dict(
        vision_config=dict(
            model_type="internvl_vision", hidden_size=32, intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=4, image_size=[28, 28], patch_size=[7, 7], attention_bias=True,
            layer_scale_init_value=0.5,
        ),
        text_config=dict(
            model_type="qwen2", vocab_size=vocab, num_hidden_layers=2, max_position_embeddings=512, rope_theta=1e6,
            rope_scaling=dict(factor=2.0, rope_type="dynamic", type="dynamic"), sliding_window=None,
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], **TEXT,
        ),
        image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=4, downsample_ratio=0.5, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def llava_next_config(ids, vocab):
    """Three patches a side of a tile; the last of four vision blocks feeds nothing."""
    return dict(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=40, num_hidden_layers=4,
            num_attention_heads=4, image_size=28, patch_size=9, projection_dim=16,
        ),
        text_config=dict(
            model_type="mistral", vocab_size=vocab, num_hidden_layers=2, max_position_embeddings=512, rope_theta=1e6,
            sliding_window=None, **TEXT,
        ),
        image_token_index=ids["<image>"], image_grid_pinpoints=PINPOINTS, use_image_newline_parameter=True,
        vision_feature_layer=-2, vision_feature_select_strategy="default", ignore_index=-100, vocab_size=vocab,
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip


def vipllava_config(ids, vocab):
    """The projector reads three of four vision blocks; the last one feeds nothing."""
    config = llava_next_config(ids, vocab)
    text = dict(model_type="llama", vocab_size=vocab, num_hidden_layers=2, max_position_embeddings=512, **TEXT)
    fields = ("vision_config", "image_token_index", "ignore_index", "projector_hidden_act", "tie_word_embeddings")
    return {field: config[field] for field in fields} | dict(
        text_config=text, vision_feature_layer=[-2, -3, 1], projector_layernorm_eps=1e-5
    )


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
QWEN = Family(
    special_tokens=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ),
    roles=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    first_ids=False,
    end_ids=("<|im_end|>", "<|endoftext|>"),
    template=QWEN_TEMPLATE,
    config=qwen_config(dict(embed_dim=32, hidden_size=48, mlp_ratio=2)),
    image_processor=dict(
        patch_size=14, temporal_patch_size=2, merge_size=2, image_mean=transformers.Qwen2VLImageProcessorPil.image_mean,
        image_std=transformers.Qwen2VLImageProcessorPil.image_std, image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2VLProcessor", min_pixels=28 * 28, max_pixels=28 * 28 * 16,
    ),
)  # fmt: skip
SMOLVLM = Family(
    special_tokens=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>",
        "<row_2_col_1>", "<fake_token_around_image>", "<image>", "<end_of_utterance>",
    ),  # without <row_2_col_2>, which is then a text, as all of them are for the largest published model
    roles=dict(eos_token="<end_of_utterance>", pad_token="<|im_end|>", unk_token="<|endoftext|>"),
    first_ids=False,
    end_ids=("<end_of_utterance>",),
    template=SMOLVLM_TEMPLATE,
    config=smolvlm_config(tied=True),
    image_processor=PIXELS
    | dict.fromkeys(("do_normalize", "do_rescale", "do_resize", "do_pad", "do_convert_rgb"), True)
    | dict(do_image_splitting=True, size=dict(longest_edge=56), max_image_size=dict(longest_edge=28), resample=1)
    | dict(image_processor_type="SmolVLMImageProcessor", processor_class="SmolVLMProcessor"),
    processor=dict(image_seq_len=4, processor_class="SmolVLMProcessor"),
)  # fmt: skip
LLAVA_NEXT = Family(
    special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    roles=dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"),
    first_ids=True,
    end_ids=("</s>",),
    template=LLAVA_NEXT_TEMPLATE,
    config=llava_next_config,
    image_processor=dict.fromkeys(
        ("do_center_crop", "do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), True
    )
    | dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    | dict(image_processor_type="LlavaNextImageProcessor", processor_class="LlavaNextProcessor", resample=3)
    | dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28), rescale_factor=1 / 255)
    | dict(aspect_ratio_setting="anyres", image_grid_pinpoints=PINPOINTS),
    processor=dict(
        patch_size=9,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        processor_class="LlavaNextProcessor",
    ),
    extra_tokens=dict(image_token="<image>"),
)
FAMILIES = {
    "llava_next": LLAVA_NEXT,
    "vipllava": dataclasses.replace(
        LLAVA_NEXT,
        template=VIPLLAVA_TEMPLATE,
        config=vipllava_config,
        image_processor={
            name: value
            for name, value in LLAVA_NEXT.image_processor.items()
            if name not in ("do_pad", "aspect_ratio_setting", "image_grid_pinpoints")
        }
        | dict(image_processor_type="CLIPImageProcessor", processor_class="LlavaProcessor"),
        processor=LLAVA_NEXT.processor | dict(processor_class="LlavaProcessor"),
    ),
    "smolvlm": SMOLVLM,
    "idefics3": dataclasses.replace(
        SMOLVLM,
        config=smolvlm_config(tied=False),
        image_processor=SMOLVLM.image_processor
        | dict(image_processor_type="Idefics3ImageProcessor", processor_class="Idefics3Processor"),
        processor=dict(image_seq_len=4, processor_class="Idefics3Processor"),
    ),
    "internvl": Family(
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        roles=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        first_ids=False,
        end_ids=("<|im_end|>",),
        template=INTERNVL_TEMPLATE,
        config=internvl_config,
        image_processor=dict.fromkeys(("do_normalize", "do_rescale", "do_resize", "do_convert_rgb"), True)
        | dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], rescale_factor=1 / 255, resample=3)
        | dict(crop_to_patches=False, min_patches=1, max_patches=4, size=dict(height=28, width=28))
        | dict(image_processor_type="GotOcr2ImageProcessorFast", processor_class="InternVLProcessor"),
        extra_tokens=dict(
            start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": dataclasses.replace(
        QWEN,
        config=qwen_config(
            dict(hidden_size=32, intermediate_size=40, out_hidden_size=48, window_size=56, fullatt_block_indexes=[1])
        ),
    ),
    "qwen3_vl": dataclasses.replace(
        QWEN,
        template=QWEN3_TEMPLATE,
        config=qwen3_config,
        image_processor=dict(
            patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
            size=dict(shortest_edge=32 * 32 * 9, longest_edge=32 * 32 * 20),
            image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor",
        ),
    ),
    "gemma3": Family(
        special_tokens=(
            "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
            "<end_of_image>", "<image_soft_token>",
        ),
        roles=dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"),
        first_ids=True,
        end_ids=("<eos>", "<end_of_turn>"),
        template=GEMMA_TEMPLATE,
        config=gemma_config,
        image_processor=PIXELS
        | dict.fromkeys(("do_normalize", "do_rescale", "do_resize"), True)
        | dict.fromkeys(("do_convert_rgb", "do_pan_and_scan", "pan_and_scan_min_crop_size"))
        | dict(image_processor_type="Gemma3ImageProcessor", processor_class="Gemma3Processor", resample=2)
        | dict(size=dict(height=28, width=28), image_seq_length=9),
        extra_tokens=dict(
            boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
        ),
        processor=dict(image_seq_length=9, processor_class="Gemma3Processor"),
    ),
}  # fmt: skip


def create(folder: Path, model_type: str) -> Path:
    """Creates the folder of a small random model."""
    family = FAMILIES[model_type]
    folder.mkdir()
    tokenizer = create_tokenizer(family)
    tokenizer.save_pretrained(folder)
    names = list(family.special_tokens)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    config = family.config(ids, len(tokenizer)) | dict(model_type=model_type, torch_dtype="float32")
    write(folder / "config.json", config)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():  # large enough that the image changes the answer
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # initially zero
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(5)
    model.save_pretrained(folder, max_shard_size="200KB")
    for file in folder.glob("*.safetensors"):  # names as on the hub
        tensors = safetensors.torch.load_file(file)
        names = {hf.canonical(module_for(model_type), name): tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(names, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {hf.canonical(module_for(model_type), name): file for name, file in index["weight_map"].items()}
    write(folder / "model.safetensors.index.json", index | dict(weight_map=weights))
    write(folder / "config.json", config)  # the fields that are published, without the defaults
    end_ids = [ids[name] for name in family.end_ids]
    write(folder / "generation_config.json", dict(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id))
    write(folder / "chat_template.json", dict(chat_template=family.template))
    write(folder / "preprocessor_config.json", family.image_processor)
    if family.processor:
        write(folder / "processor_config.json", family.processor)
    return folder


def create_tokenizer(family: Family) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer on the names and facts of the synthetic people."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [f"{p.name} {' '.join(p.facts.values())}" for p in people.SIXTY.people()]
    trainer = trainers.BpeTrainer(
        vocab_size=394,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=list(family.special_tokens) if family.first_ids else [],
    )
    raw.train_from_iterator(texts, trainer)
    raw.add_special_tokens(list(family.special_tokens))
    if bos := family.roles.get("bos_token"):
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    extra = dict(extra_special_tokens=dict(family.extra_tokens)) if family.extra_tokens else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **family.roles, **extra)


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(content))
