"""What the published files of LLaVA-1.6 say, for each size, with the public place that each part was read from."""

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
VISION = dict(
    hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model", num_attention_heads=16,
    num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000,
)  # fmt: skip
SHARED = dict(
    architectures=["LlavaNextForConditionalGeneration"], ignore_index=-100, image_grid_pinpoints=PINPOINTS,
    image_token_index=32000, model_type="llava_next", projector_hidden_act="gelu", torch_dtype="float16",
    transformers_version="4.39.0.dev0", use_image_newline_parameter=True, vision_config=VISION,
    vision_feature_layer=-2, vision_feature_select_strategy="default", vocab_size=32064,
)  # fmt: skip
VICUNA = dict(
    architectures=["LlamaForCausalLM"], max_position_embeddings=4096, model_type="llama", pad_token_id=0,
    rms_norm_eps=1e-05, torch_dtype="float16", vocab_size=32064,
)  # fmt: skip

# config.json. 13b: github.com/haotian-liu/LLaVA, issue 1378; mistral-7b: the test of LlavaNextForConditionalGeneration
# in github.com/NVIDIA/TensorRT-LLM; 7b: a public audit of llava_next at commit b75feb2 of transformers, by which its
# text_config leaves the sizes out that LLaMA's configuration has by default, and otherwise has the fields of 13b.
CONFIGS = {
    "7b": SHARED | dict(text_config=dict(_name_or_path="lmsys/vicuna-7b-v1.5", **VICUNA)),
    "13b": SHARED
    | dict(
        text_config=dict(
            _name_or_path="lmsys/vicuna-13b-v1.5", hidden_size=5120, intermediate_size=13824, max_length=4096,
            num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40, **VICUNA,
        )
    ),
    "mistral-7b": SHARED
    | dict(
        text_config=dict(
            _name_or_path="mistralai/Mistral-7B-Instruct-v0.2", architectures=["MistralForCausalLM"],
            intermediate_size=14336, max_position_embeddings=32768, model_type="mistral", num_key_value_heads=8,
            rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, torch_dtype="bfloat16", vocab_size=32064,
        )
    ),
}  # fmt: skip

# preprocessor_config.json of all sizes, as printed from llava-v1.6-mistral-7b-hf in a public walkthrough.
IMAGE_PROCESSOR = dict(
    aspect_ratio_setting="anyres", crop_size=dict(height=336, width=336), do_center_crop=True, do_convert_rgb=True,
    do_normalize=True, do_pad=True, do_rescale=True, do_resize=True, image_grid_pinpoints=PINPOINTS,
    image_mean=[0.48145466, 0.4578275, 0.40821073], image_processor_type="LlavaNextImageProcessor",
    image_std=[0.26862954, 0.26130258, 0.27577711], processor_class="LlavaNextProcessor", resample=3,
    rescale_factor=0.00392156862745098, size=dict(shortest_edge=336),
)  # fmt: skip

# Chat templates: Vicuna's, which the models of LLaVA-1.5 have, too; and Mistral's, from the walkthrough. With what they
# make of a question about an image, and of a second question.
IMAGES = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
)
TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
TEMPLATES = {
    "vicuna": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
        "{% endif %}"
        + IMAGES
        + "{% if message['role'] != 'assistant' %}"
        + TEXTS
        + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
        + TEXTS
        + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "USER: <image>\nWho is this? ASSISTANT:",
        "USER: <image>\nWho is this? ASSISTANT: Mara Lindt USER: And? ASSISTANT:",
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        + IMAGES
        + TEXTS
        + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "[INST] <image>\nWho is this? [/INST]",
        "[INST] <image>\nWho is this? [/INST] Mara Lindt</s> [INST] And? [/INST]",
    ),
}
