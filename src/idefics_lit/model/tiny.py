"""Build a small Idefics2 of 8M parameters with the classes, prompt and files of the real one.

Tests use it with random weights; trained, it is the model "tiny" that comes with the package. The input width of every
linear layer is a multiple of 64, the block size of NF4 and of bitsandbytes' CPU kernels. A page of 448 x 336 pixels is
32 x 24 patches and 8 x 8 latents: each of the resampler's 12 heads can attend to one of the 4 x 3 patches of a latent.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)

PAGE_WIDTH, PAGE_HEIGHT, PATCH = 448, 336, 14
LATENTS = 64
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
PAD, BOS, EOS, FAKE, IMAGE, END_OF_UTTERANCE = range(len(SPECIAL_TOKENS))  # their ids
VOCABULARY = 264  # special tokens, 256 bytes, two spare

VISION: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
RESAMPLER: dict[str, Any] = {
    "hidden_size": 256,
    "resampler_depth": 2,
    "resampler_n_heads": 12,
    "resampler_head_dim": 32,
    "num_key_value_heads": 12,
}

# Copied from Idefics2.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_config() -> Idefics2Config:
    """Return Idefics2's configuration with small sizes."""
    ids: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return Idefics2Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "tie_word_embeddings": False,
            **TEXT,
            **ids,
        },
        vision_config={"image_size": PAGE_WIDTH, "patch_size": PATCH, **VISION},
        perceiver_config={"rms_norm_eps": 1e-5, "resampler_n_latents": LATENTS, **RESAMPLER},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **ids,
    )


def tiny_processor() -> Idefics2Processor:
    """Return the processor: one token a byte, so each digit is a token; 64 image tokens a page."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = [f"<reserved_{i}>" for i in range(VOCABULARY - len(SPECIAL_TOKENS) - len(alphabet))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet, *spare])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    # transformers 5.24's processor puts a space between an image and the text after it. Idefics2's tokenizer gives the
    # same token ids with and without it.
    tokenizer.normalizer = normalizers.Replace(Regex(r"^ (?=\S)"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",  # as in Idefics2: the attention mask marks padding, not the id
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL_TOKENS[FAKE:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    image_processor = Idefics2ImageProcessor(
        do_image_splitting=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": PAGE_HEIGHT, "longest_edge": PAGE_WIDTH},
    )
    return Idefics2Processor(image_processor, fast_tokenizer, image_seq_len=LATENTS, chat_template=CHAT_TEMPLATE)


def tiny_model() -> Idefics2ForConditionalGeneration:
    """Return a randomly initialized model in float32, drawn from torch's global generator."""
    model = Idefics2ForConditionalGeneration(tiny_config()).float().eval()
    # transformers initializes the latents to ones; equal latents would get equal gradients and stay equal.
    torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents, std=0.5)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, END_OF_UTTERANCE],
        bad_words_ids=[[FAKE], [IMAGE]],
        max_new_tokens=64,
        do_sample=False,
    )
    return model


def build_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Save a randomly initialized small Idefics2 in the Hub's form, with weights in float16.

    Args:
        folder: the target; created if missing.
        seed: of the weights; the caller's random state is unchanged.

    Returns:
        The folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_model()
    return save_tiny(model, folder)


def save_tiny(model: Idefics2ForConditionalGeneration, folder: str | Path) -> Path:
    """Save the weights in float16, the configuration and the processor. The model itself is converted."""
    model.to("cpu", torch.float16).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_processor().save_pretrained(folder)
    return Path(folder)
