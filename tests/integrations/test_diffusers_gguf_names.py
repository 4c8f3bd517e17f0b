"""Names by diffusers' own functions, traced without a weight: rows as its functions cut and join them."""

from __future__ import annotations

import numpy as np
import pytest

import weightpack as wp
from weightpack import keymaps
from weightpack.integrations.diffusers.gguf_names import StandIn, gguf_names
from weightpack.mapping import Rows

from ..diffusion_models import make
from .test_diffusers_gguf import relative


@pytest.mark.parametrize("name", ["sd3", "wan", "ltxv"])
def test_they_are_the_names_of_our_own_maps(peer, tmp_path, name):
    model = make(name, peer("diffusers"))
    model.save_pretrained(tmp_path / "model")
    wp.convert(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    with wp.open_checkpoint(tmp_path / "model.gguf") as stored:
        ours = {
            tensor.name: tensor.sources for tensor in keymaps.read_keymap(name).host_plan(list(stored.values())).tensors
        }
        found = gguf_names(model, {key: entry.shape for key, entry in stored.items()})
        assert found is not None
        theirs = {tensor.name: tensor.sources for tensor in found}
        assert set(theirs) == set(ours)
        counts = {
            key: int(np.prod(entry.shape[:-1])) if len(entry.shape) > 1 else entry.shape[0]
            for key, entry in stored.items()
        }
        for key, sources in ours.items():
            told = [
                (rows.name, rows.first, counts[rows.name] - rows.first if rows.count is None else rows.count)
                for rows in sources
            ]
            whole = [
                (rows.name, rows.first, counts[rows.name] if rows.count is None else rows.count) for rows in theirs[key]
            ]
            assert told == whole, key


AURA = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
    "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 64,
    "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip


def aura_name(name: str) -> str:
    """A name of diffusers' AuraFlow as the original has it."""
    for theirs, original in (
        ("time_step_proj.linear_1", "t_embedder.mlp.0"), ("time_step_proj.linear_2", "t_embedder.mlp.2"),
        ("context_embedder", "cond_seq_linear"), ("norm_out.linear", "modF.1"), ("proj_out", "final_linear"),
        ("pos_embed.proj", "init_x_linear"), ("pos_embed.pos_embed", "positional_encoding"),
        ("joint_transformer_blocks", "double_layers"), ("single_transformer_blocks", "single_layers"),
        ("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"), ("ff_context", "mlpC"),
        ("norm1_context.linear", "modC.1"), ("to_add_out", "w1o"), ("add_q_proj", "w1q"), ("add_k_proj", "w1k"),
        ("add_v_proj", "w1v"),
    ):  # fmt: skip
        name = name.replace(theirs, original)
    letter, key = ("w2", ".norm1.") if name.startswith("double") else ("w1", ".norm1.")
    name = name.replace(key + "linear", ".modX.1" if name.startswith("double") else ".modCX.1")
    name = name.replace(".ff.", ".mlpX." if name.startswith("double") else ".mlp.")
    for part in "qkv":
        name = name.replace(f"to_{part}", f"{letter}{part}")
    return name.replace("to_out.0", f"{letter}o")


@pytest.mark.parametrize("type", ["Q8_0", "Q5_1"])
def test_a_class_that_only_diffusers_has_a_function_for(peer, tmp_path, type):
    diffusers, torch = peer("diffusers"), peer("torch")
    torch.manual_seed(5)
    source = diffusers.AuraFlowTransformer2DModel(**AURA).eval()
    source.save_pretrained(tmp_path / "model")
    tensors, types = {}, {}
    for name, value in source.state_dict().items():
        if name == "norm_out.linear.weight":
            value = torch.cat(value.chunk(2)[::-1])
        key = aura_name(name)
        tensors[key] = value.numpy()
        types[key] = type if value.ndim == 2 and value.shape[-1] % 32 == 0 else "F32"
    wp.gguf.write(tmp_path / "aura.gguf", tensors, {"general.architecture": "aura"}, types=types)
    model = wp.from_pretrained(
        diffusers.AuraFlowTransformer2DModel, tmp_path / "aura.gguf", config=tmp_path / "model",
        quantization_config=wp.GGUFQuantizationConfig(),
    )  # fmt: skip
    packed = {name: value for name, value in model.state_dict().items() if hasattr(value, "quant_type")}
    assert "norm_out.linear.weight" in packed
    for name, value in packed.items():
        expected = wp.gguf.quantize(source.state_dict()[name], type)
        assert torch.equal(value.as_subclass(torch.Tensor), expected), name
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 3, 64),
        "timestep": torch.tensor([0.3]),
    }  # fmt: skip
    with torch.no_grad():
        error = relative(model(**given).sample, source(**given).sample)
    assert 0 < error < 0.1


def test_kernels_of_a_unet_with_original_names(peer, tmp_path):
    diffusers, torch = peer("diffusers"), peer("torch")
    torch.manual_seed(6)
    source = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D", cross_attention_dim=32, norm_num_groups=8,
    ).eval()  # fmt: skip
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    places = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    }  # fmt: skip
    tensors, types, metadata = {}, {}, {"general.architecture": "sd1"}
    for name, value in source.state_dict().items():
        if name.startswith("mid_block"):
            continue
        place = next(key for key in places if name.startswith(f"{key}."))
        rest = name.removeprefix(place)
        for theirs, original in resnet.items():
            rest = rest.replace(f".{theirs}.", f".{original}.")
        key, array = places[place] + rest, value.numpy()
        types[key] = "F32"
        if array.ndim == 4 and array.size % 256 == 0:
            metadata[f"comfy.gguf.orig_shape.{key}"] = np.array(array.shape, np.int32)
            array, types[key] = array.reshape(-1, 256), "Q4_K"
        tensors[key] = array
    wp.gguf.write(tmp_path / "unet.gguf", tensors, metadata, types=types)
    with wp.open_checkpoint(tmp_path / "unet.gguf") as checkpoint:
        from weightpack.integrations.diffusers import ADAPTER
        from weightpack.loading.gguf_source import host_named

        view = host_named(checkpoint, ADAPTER, source, list(source.state_dict()))
        expected = {name for name in source.state_dict() if not name.startswith("mid_block")}
        assert set(view.entries) == expected
        for name in expected:
            assert view.entries[name].shape == tuple(source.state_dict()[name].shape)
        assert view.entries["down_blocks.1.resnets.0.conv1.weight"].format == "gguf:q4_k"


def test_stand_ins_do_what_tensors_do(peer):
    torch = peer("torch")
    shapes = {"a": (6, 4), "b": (2, 4), "k": (4, 3, 1, 1), "v": (5,)}
    numbers, start = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        numbers[name] = torch.arange(start, start + count).reshape(shape)
        start += count

    def read(mapped):
        rows = []
        for part in mapped.sources:
            source = numbers[part.name]
            flat = source.reshape(-1, source.shape[-1]) if source.ndim > 1 else source
            rows.append(flat[part.first :][: part.count])
        whole = torch.cat(rows)
        if mapped.sources[0].is_whole:
            whole = whole.reshape(shapes[mapped.sources[0].name])
        return whole if mapped.shape is None else whole.reshape(mapped.shape)

    for change in (
        lambda t: t["a"],
        lambda t: t["a"].chunk(4)[3 - 1],
        lambda t: torch.chunk(t["a"], 3, dim=0)[1],
        lambda t: torch.split(t["a"], [1, 2, 3])[2],
        lambda t: torch.cat([t["a"][2:5], t["b"]], dim=0),
        lambda t: torch.cat(list(t["a"].chunk(2))[::-1]),
        lambda t: torch.cat(t["a"].chunk(2)),
        lambda t: t["k"].squeeze(-1).squeeze(-1),
        lambda t: t["k"][1:3],
        lambda t: t["k"].reshape(4, -1),
        lambda t: torch.cat([t["v"][3:], t["v"][:3]]),
        lambda t: t["v"].unsqueeze(0).contiguous().clone(),
        lambda t: t["a"].view(2, 3, 4)[1:],
    ):
        made = change({name: StandIn.whole(name, shape) for name, shape in shapes.items()})
        expected = change(numbers)
        assert torch.equal(read(made.mapped("x", shapes)), expected)
    whole = StandIn.whole("a", (6, 4))
    assert torch.cat(whole.chunk(2)).mapped("x", shapes).sources == (Rows("a"),)
    for change in (
        lambda t: t.chunk(2, dim=1),
        lambda t: t[0],
        lambda t: t.reshape(3, 8)[1:],
        lambda t: torch.cat([t, t], dim=1),
        lambda t: torch.add(t, 1),
    ):
        with pytest.raises(TypeError):
            change(whole)
