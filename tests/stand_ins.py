"""Small Idefics3 and SmolVLM models with random weights and their processors, saved in the Hub's form.

The tokenizer has one token a byte. The special tokens, the chat templates and the classes are those of the real ones:

- "idefics3" is Idefics3-8B: row and column tags are text, and the tokenizer adds a BOS that the template has too;
- "smolvlm" is SmolVLM and SmolVLM2: tags are special tokens, and the tokenizer adds nothing.

A tile of 112 x 112 pixels has 8 x 8 patches and 16 image tokens. The input width of every linear layer is a multiple of
64, the block size of NF4.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
)

KINDS = ("idefics3", "smolvlm")
TILE, PATCH, SCALE = 112, 14, 2
GEOMETRY = TILE, PATCH, SCALE
TAGS = ["<global-img>", *[f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]]
IMAGE_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
FIRST_TOKENS = {  # end of text, beginning of text, padding
    "idefics3": ["<|end_of_text|>", "<|begin_of_text|>", "<|reserved_special_token_0|>"],
    "smolvlm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
ANOTHER_END = "<|eot_id|>"  # Idefics3-8B's generation_config names ends that its tokenizer doesn't
CHAT_TEMPLATE = (
    "BOS{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def stand_in_processor(kind, geometry=GEOMETRY):
    tile, patch, scale = geometry
    special = FIRST_TOKENS[kind] + (TAGS if kind == "smolvlm" else [ANOTHER_END]) + IMAGE_TOKENS
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    end, bos, pad = FIRST_TOKENS[kind]
    if kind == "idefics3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=end if kind == "idefics3" else IMAGE_TOKENS[2],
        pad_token=pad,
        additional_special_tokens=IMAGE_TOKENS,
        model_max_length=8192,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile})
    tokens = (tile // patch // scale) ** 2
    return Idefics3Processor(images, fast, image_seq_len=tokens, chat_template=CHAT_TEMPLATE.replace("BOS", bos))


def stand_in_config(kind, processor, geometry=GEOMETRY, **text):
    tile, patch, scale = geometry
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer) + -len(tokenizer) % 8,
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        **ids,
        **text,
    }
    vision = {"image_size": tile, "patch_size": patch, "hidden_size": 192, "intermediate_size": 768}
    config_class = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}[kind]
    return config_class(
        text_config=text,
        vision_config={**vision, "num_hidden_layers": 4, "num_attention_heads": 6},
        scale_factor=scale,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def build_stand_in(kind, folder, seed=0, geometry=GEOMETRY, **text):
    """Save a stand-in in float16 and return the folder.

    ``geometry`` is the size of a tile, of a patch, and the scale factor of the pixel shuffle; ``text`` changes the text
    model's configuration.
    """
    processor = stand_in_processor(kind, geometry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(stand_in_config(kind, processor, geometry, **text))
    tokenizer = processor.tokenizer
    ends = [IMAGE_TOKENS[2], *([tokenizer.eos_token, ANOTHER_END] if kind == "idefics3" else [])]
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.convert_tokens_to_ids(ends), do_sample=False
    )
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
