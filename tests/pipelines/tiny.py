"""A tiny text-to-image pipeline with models of both hosts, made here and run in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import find_peer
from tests.integrations.tiny_diffusers import make as make_model

WIDTH = 64
PROMPT = "a small red cube"


def tokenizer() -> Any:
    """A tokenizer of single letters."""
    transformers = find_peer("transformers")
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def text_encoder() -> Any:
    """A CLIP text model whose weights are random."""
    torch, transformers = find_peer("torch"), find_peer("transformers")
    torch.manual_seed(11)
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def make(dtype: Any = None) -> Any:
    """A Stable Diffusion pipeline."""
    diffusers, torch = find_peer("diffusers"), find_peer("torch")
    dtype = dtype or torch.float32
    unet = make_model("unet", diffusers, dtype=dtype, block_out_channels=(64, 64), cross_attention_dim=WIDTH)
    vae = make_model("vae", diffusers, dtype=dtype)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, clip_sample=False, steps_offset=1)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder().to(dtype), tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_flux(dtype: Any) -> Any:
    """A Flux pipeline: a transformer, and two text encoders of different kinds."""
    diffusers, torch, transformers = find_peer("diffusers"), find_peer("torch"), find_peer("transformers")
    torch.manual_seed(12)
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vae = make_model("vae", diffusers, dtype=dtype, shift_factor=0.0, scaling_factor=1.0)
    transformer = make_model("flux", diffusers, dtype=dtype)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        text_encoder=text_encoder().to(dtype),
        tokenizer=tokenizer(),
        text_encoder_2=transformers.T5EncoderModel(config).eval().to(dtype),
        tokenizer_2=tokenizer(),
    )


def save(folder: Path, dtype: Any = None, **options: Any) -> Any:
    """The pipeline, and what diffusers saves of it."""
    pipeline = make(dtype)
    pipeline.save_pretrained(folder, **options)
    return pipeline


def image(pipeline: Any) -> Any:
    """What a pipeline makes of a fixed prompt and fixed noise, as an array of numbers from 0 to 1."""
    torch = find_peer("torch")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    options = {"max_sequence_length": 16} if type(pipeline).__name__ == "FluxPipeline" else {}
    return pipeline(
        PROMPT, num_inference_steps=2, height=8, width=8, generator=generator, output_type="np", **options
    ).images
