"""The torch executor, statistics, calibration images, annotation and LayerNorm folding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit
from tvm import relax
from tvm.ir import IRModule

from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.observe import View, observe
from tvm_vitq.calibrate.reparameterize import (
    channel_ranges,
    find_folds,
    fit_channels,
    fold_quantizers,
    observe_with_folds,
)
from tvm_vitq.calibrate.searches import minmax, mse, percentile, quantizer_numbers
from tvm_vitq.calibrate.sources import load_images
from tvm_vitq.calibrate.statistics import Collector, Summary, rows_of
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, call, op_name, shape_of
from tvm_vitq.relax_passes.annotate import annotate
from tvm_vitq.relax_passes.constants import replace_constants
from tvm_vitq.relax_passes.sites import bindings, image_sites, list_sites
from tvm_vitq.site_rules import resolve_specs

SHAPE = (3, 16, 16)


def images(count=6, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def annotated(mod, bits="w8a8", overrides=None):
    names = [site.name for site in list_sites(mod)]
    specs = resolve_specs(names, bits, image_sites=image_sites(mod), overrides=overrides)
    return *annotate(mod, specs), specs


def job_of(mod, count=6, **asked):
    marked, aliases, specs = annotated(mod, **asked)
    return Job(marked, specs, aliases, images(count), show_progress=False)


def torch_vit(constants, x, depth=2, heads=2, patch=4, eps=1e-6):
    """The function of tiny_vit written independently, on [N, 3, 16, 16]."""
    from torch.nn import functional as F

    def linear(x, site):
        return F.linear(x, constants[f"{site}.weight"], constants[f"{site}.bias"])

    def norm(x, site):
        return F.layer_norm(x, x.shape[-1:], constants[f"{site}.gamma"], constants[f"{site}.beta"], eps)

    kernel = constants["patch_embed.proj.weight"].reshape(-1, 3, patch, patch)
    x = F.conv2d(x, kernel, constants["patch_embed.proj.bias"], patch).flatten(2).transpose(1, 2)
    token = constants["cls_token.0.0"][:1].expand(len(x), -1, -1)
    x = torch.cat([token, x], 1) + constants["pos_embed.1"]
    for i in range(depth):
        site = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{site}.norm1"), f"{site}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{site}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{site}.norm2"), f"{site}.mlp.fc1"))
        x = x + linear(hidden, f"{site}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


# Executor


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_executor_is_the_model_at_any_count(batch):
    executor = Executor(tiny_vit(batch=batch))
    for count in (1, 3, 5):
        x = images(count)
        expected = torch_vit(executor.constants, x)
        torch.testing.assert_close(executor.run(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(executor.run(x, chunk=2), expected, atol=1e-5, rtol=1e-4)


def test_executor_matches_relax():
    """The same graph through TVM's own legalization is not at hand for our operators; builtin ones are."""
    x = relax.Var("x", relax.TensorType((2, 3, 8, 8), "float32"))
    rng = np.random.default_rng(0)
    weight = relax.const(rng.normal(size=(4, 3, 3, 3)).astype("float32"))
    vectors = [relax.const(rng.uniform(0.5, 1.5, 4).astype("float32")) for _ in range(4)]
    index = relax.const(np.array([3, 0, 2], "int64"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(relax.op.nn.conv2d(x, weight, padding=1, strides=2))
            y = block.emit(relax.op.nn.batch_norm(y, *vectors, axis=1, training=False))
            y = block.emit(relax.TupleGetItem(y, 0))
            y = block.emit(relax.op.nn.silu(y))
            z = block.emit(relax.op.nn.avg_pool2d(y, (2, 2), strides=(2, 2)))
            m = block.emit(relax.op.nn.max_pool2d(y, (3, 3), strides=(2, 2), padding=(1, 1)))
            y = block.emit(relax.op.subtract(z, relax.op.divide(m, relax.const(2.0, "float32"))))
            y = block.emit(relax.op.take(y, index, axis=1))
            y = block.emit(relax.op.permute_dims(relax.op.reshape(y, (2, 3, 4)), [0, 2, 1]))
            parts = block.emit(relax.op.split(y, 3, axis=2))
            y = block.emit(relax.op.concat([relax.TupleGetItem(parts, 2), relax.TupleGetItem(parts, 0)], 1))
            y = block.emit(relax.op.matmul(y, relax.op.permute_dims(y, [0, 2, 1])))
            y = block.emit(relax.op.nn.softmax(y, axis=-1))
            y = block.emit(relax.op.mean(relax.op.exp(y), [1], keepdims=True))
            y = block.emit(relax.op.squeeze(relax.op.clip(y, 0, 1.1), [1]))
            y = block.emit(relax.op.strided_slice(y, [1], [1], [7], [2]))
            out = block.emit_output(relax.op.broadcast_to(relax.op.expand_dims(y, [1]), (2, 5, 3)))
        block.emit_func_output(out)
    mod = relax.transform.Normalize()(block.get())
    data = rng.normal(size=(2, 3, 8, 8)).astype("float32")
    import tvm

    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    expected = vm["main"](tvm.runtime.tensor(data)).numpy()
    found = Executor(mod).run(torch.from_numpy(np.concatenate([data, data[:1]]))).numpy()
    np.testing.assert_allclose(found[:2], expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found[2], expected[0], atol=1e-5, rtol=1e-4)


def test_gradients_reach_weights_and_images():
    executor = Executor(tiny_vit(depth=1))
    name = "blocks.0.mlp.fc1.weight"
    executor.constants[name] = executor.constants[name].clone().requires_grad_()
    x = images(2).requires_grad_()
    executor.run(x).square().sum().backward()
    assert executor.constants[name].grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_hooks_see_and_replace():
    class Double(Hooks):
        def __init__(self):
            self.seen = {}

        def value(self, name, x):
            self.seen[name] = tuple(x.shape)
            return x * 2 if name == "head" else x

        def probs(self, site, probs):
            self.seen[site] = tuple(probs.shape)
            return probs

    executor, hooks = Executor(tiny_vit()), Double()
    torch.testing.assert_close(executor.run(images(4), hooks), executor.run(images(4)) * 2)
    assert hooks.seen["blocks_0_attn_q"] == (2, 2, 2, 17, 16)
    assert hooks.seen["blocks.0.attn.probs"] == (2, 2, 2, 17, 17)


def test_unknown_operator_is_named():
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(block.emit(relax.op.cumsum(x, 1), name_hint="tokens_sum"))
        block.emit_func_output(out)
    with pytest.raises(VitqError, match=r"tokens_sum[\s\S]*relax\.cumsum"):
        Executor(block.get())


def test_wrong_input_shape():
    with pytest.raises(VitqError, match="shape"):
        Executor(tiny_vit()).run(torch.zeros(1, 3, 8, 8))


# Annotation


def test_annotate_shares_by_variable_and_wish():
    mod, aliases, _ = annotated(tiny_vit(gated=True))
    sites = [attrs(b.value)["site"] for b in bindings(mod) if op_name(b.value) == "vitq.quantize"]
    assert aliases == {f"blocks.{i}.mlp.fc1_g.input": f"blocks.{i}.mlp.fc1.input" for i in range(2)}
    assert len(sites) == len(set(sites)) == 2 * 7 + 2
    mod, aliases, _ = annotated(tiny_vit(gated=True), overrides={"blocks.0.mlp.fc1_g.input": 4})
    assert set(aliases) == {"blocks.1.mlp.fc1_g.input"}


def test_annotate_changes_nothing_else():
    mod = tiny_vit()
    marked, _, _ = annotated(mod)
    assert list_sites(marked) == list_sites(mod)
    names = [b.var.name for b in bindings(marked)]
    assert len(names) == len(set(names))
    before = {b.var.name: shape_of(b.var) for b in bindings(mod)}
    assert before == {b.var.name: shape_of(b.var) for b in bindings(marked) if b.var.name in before}
    assert torch.equal(Executor(mod).run(images()), Executor(marked).run(images()))


def test_image_sites_and_missing_wishes():
    assert image_sites(tiny_vit()) == {"patch_embed.proj.input"}
    with pytest.raises(VitqError, match=r"patch_embed\.proj\.input"):
        annotate(tiny_vit(), {})


def test_replace_constants():
    mod = tiny_vit()
    new = replace_constants(mod, {"head.bias": np.arange(10.0)})
    difference = Executor(new).run(images()) - Executor(mod).run(images())
    old = Executor(mod).constants["head.bias"]
    torch.testing.assert_close(difference, (torch.arange(10.0) - old).expand(6, -1), atol=1e-5, rtol=1e-5)
    with pytest.raises(VitqError, match=r"heads\.bias"):
        replace_constants(mod, {"heads.bias": np.zeros(10)})
    with pytest.raises(VitqError, match="shape"):
        replace_constants(mod, {"head.bias": np.zeros(9)})


# Statistics and searches


@pytest.mark.parametrize("rows", [1, 3])
def test_collected_quantiles_are_exact(rows):
    x = torch.randn(rows, 30000, generator=torch.Generator().manual_seed(1)) ** 3
    collector = Collector(30000, 1e-3, 2000, torch.Generator().manual_seed(0))
    for part in x.split(7000, 1):
        collector.add(part)
    summary = collector.summary()
    for p in (0.999, 0.9999, 0.99999, 1.0):
        low, high = summary.quantiles(p)
        np.testing.assert_allclose(high, np.quantile(x.numpy(), p, axis=1), rtol=1e-4)
        np.testing.assert_allclose(low, np.quantile(x.numpy(), 1 - p, axis=1), rtol=1e-4)
        np.testing.assert_allclose(Summary.of(x).quantiles(p)[1], high, rtol=1e-5)
    with pytest.raises(VitqError, match="tails"):
        summary.quantiles(0.99)
    scale, zero = (torch.from_numpy(v) for v in quantizer_numbers(*summary.quantiles(0.999), 4, False))
    exact = Summary.of(x).squared_error(scale, zero, 0, 15)
    np.testing.assert_allclose(summary.squared_error(scale, zero, 0, 15), exact, rtol=0.1)


def test_rows_follow_the_plans_order():
    x = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    assert rows_of(x, "token", -2).shape == (3, 8)
    assert rows_of(x, "head", -3)[1, 0] == 12
    assert rows_of(x, "group", None, 2).shape == (2, 12)
    weight = torch.arange(12.0).reshape(3, 4)
    assert rows_of(weight, "group", 0, 2)[1].tolist() == [2, 3]
    assert rows_of(weight, "channel", 0)[2].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searches_clip_outliers(bits, signed):
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 12.0
    summary = Summary.of(x)

    def error(rule):
        low, high = rule(summary, bits, signed)
        assert (low >= -12).all() and (high <= 12).all()
        qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        scale, zero = (torch.from_numpy(v) for v in quantizer_numbers(low, high, bits, signed))
        return summary.squared_error(scale, zero, -qmax if signed else 0, qmax)

    whole, clipped, searched = error(minmax), error(percentile()), error(mse())
    assert (searched <= whole).all()
    if bits < 8:
        assert (
            clipped[0] < 0.8 * whole[0]
            and searched[0] < 0.6 * whole[0]
            and (searched <= clipped * 1.01).all()
        )


def test_observe_ranges_and_summaries():
    job = job_of(tiny_vit(), count=20)
    found = observe(job, {"blocks.0.attn.q": View("head", -3), "blocks.0.attn.probs": View("tensor")}, 1e-3)
    assert found["blocks.0.attn.q"].minimum.shape == (2,)
    assert 0 < found["blocks.0.attn.probs"].maximum.item() <= 1
    assert set(job.ranges) == {b.var.name for b in bindings(job.mod)} | {"x"}
    assert job.ranges["x"] == pytest.approx(job.images.abs().max().item())
    assert job.ranges["logits"] == pytest.approx(job.executor.run(job.images).abs().max().item(), rel=1e-5)


def test_nan_in_weights_and_values_is_named():
    mod = tiny_vit()
    weight = Executor(mod).constants["blocks.1.mlp.fc1.weight"].numpy().copy()
    weight[0, 0] = np.nan
    with pytest.raises(VitqError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        job_of(replace_constants(mod, {"blocks.1.mlp.fc1.weight": weight}))
    weight[:] = 3e38
    with pytest.raises(VitqError, match="blocks_1_mlp_fc1"):
        observe(job_of(replace_constants(mod, {"blocks.1.mlp.fc1.weight": weight})), {})


# LayerNorm folding


def folded(mod, bits="w4a4"):
    job = job_of(mod, count=32, bits=bits)
    folds = find_folds(job)
    summaries = observe_with_folds(job, folds, {}, 1e-3)
    fit_channels(job, folds, channel_ranges(job, folds, summaries, percentile()))
    fold_quantizers(job, folds)
    return job, folds


@pytest.mark.parametrize(
    "mod", [tiny_vit(gated=True), tiny_vit(pool="mean", outliers=20.0)], ids=["glu", "mean"]
)
def test_fold_is_exact(mod):
    job, folds = folded(mod)
    assert [fold.layer for fold in folds] == [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)] + [
        "norm"
    ]
    before, after = Executor(mod).run(images()), job.executor.run(images())
    torch.testing.assert_close(after, before, atol=1e-3 * before.abs().max().item(), rtol=0)
    assert torch.equal(Executor(job.mod).run(images()), after)


def test_fold_gives_every_channel_its_own_scale():
    """The codes of the folded tensor are those of a per-channel quantizer on the original one."""
    mod = tiny_vit(outliers=20.0)
    job, _ = folded(mod)
    site = "blocks.0.attn.qkv.input"

    class Keep(Hooks):
        def quantize(self, name, x):
            if name == site:
                self.x = x
            return x

    original, scaled = Keep(), Keep()
    Executor(annotated(mod)[0]).run(images(32), original)
    job.executor.run(images(32), scaled)
    spread = original.x.flatten(0, -2).std(0)
    assert spread.max() / spread.min() > 8
    spread = scaled.x.flatten(0, -2).std(0)
    assert spread.max() / spread.min() < 2
    quantizer = job.quantizers[site]
    codes = (scaled.x / quantizer.scale[0]).round() + quantizer.zero_point[0]
    assert ((codes < 0) | (codes > 15)).float().mean() < 0.02


def test_fold_updates_ranges():
    job, _ = folded(tiny_vit(outliers=20.0))
    again = Job(job.mod, job.specs, job.aliases, job.images, show_progress=False)
    observe(again, {})
    for name, largest in again.ranges.items():
        assert job.ranges[name] == pytest.approx(largest, rel=1e-3), name


def test_fold_declines_with_reasons():
    job = job_of(tiny_mixer())
    folds = find_folds(job)
    assert {fold.layer for fold in folds} == {"blocks.0.norm2", "blocks.1.norm2", "norm"}
    assert "no longer the last axis" in job.notes["blocks.0.norm1"]
    job = job_of(tiny_vit(), overrides={"blocks.0.attn.qkv.input": {"granularity": "token"}})
    assert "blocks.0.norm1" not in {fold.layer for fold in find_folds(job)}
    assert "per token" in job.notes["blocks.0.norm1"]


def test_fold_follows_channels_through_windows():
    """Swin's window partition merges and splits the channel axis on the way and brings every channel back."""
    x = relax.Var("x", relax.TensorType((1, 4, 4, 8), "float32"))
    rng = np.random.default_rng(0)
    vector, weight = (relax.const(rng.normal(size=s).astype("float32")) for s in ((8,), (8, 8)))
    roll = relax.const(np.array([1, 2, 3, 0]))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(
                call("vitq.layer_norm", [x, vector, vector], site="norm", eps=1e-6), name_hint="norm"
            )
            y = block.emit(relax.op.take(y, roll, axis=1), name_hint="rolled")
            y = block.emit(relax.op.reshape(y, (2, 2, 2, 16)), name_hint="split")
            y = block.emit(relax.op.permute_dims(y, [0, 2, 1, 3]), name_hint="moved")
            y = block.emit(relax.op.reshape(y, (4, 4, 8)), name_hint="windows")
            out = block.emit_output(call("vitq.linear", [y, weight, vector], site="fc"), name_hint="fc")
        block.emit_func_output(out)
    marked, aliases, specs = annotated(block.get(), "w8a8")
    data = torch.randn(6, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    job = Job(marked, specs, aliases, data, show_progress=False)
    (fold,) = find_folds(job)
    assert fold.linears == ["fc"]
    before = job.executor.run(data)
    fit_channels(
        job, [fold], channel_ranges(job, [fold], observe_with_folds(job, [fold], {}, 1e-3), percentile())
    )
    fold_quantizers(job, [fold])
    torch.testing.assert_close(job.executor.run(data), before, atol=1e-4, rtol=1e-4)
    assert job.ranges["moved"] == pytest.approx(job.ranges["norm"])


def test_fold_of_a_residual_norm_declines():
    x = relax.Var("x", relax.TensorType((1, 4, 8), "float32"))
    ones, weight = relax.const(np.ones(8, "float32")), relax.const(np.eye(8, dtype="float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(call("vitq.layer_norm", [x, ones, ones], site="norm", eps=1e-6), name_hint="norm")
            z = block.emit(call("vitq.linear", [y, weight, ones], site="fc"), name_hint="fc")
            out = block.emit_output(relax.op.add(y, z))
        block.emit_func_output(out)
    marked, aliases, specs = annotated(block.get())
    job = SimpleNamespace(mod=marked, specs=specs, notes={}, aliases=aliases)
    assert find_folds(job) == []
    assert "relax.add" in job.notes["norm"]


# Calibration images


def test_arrays_tensors_and_loaders():
    data = images(5)
    for source in (data, data.numpy(), [data[:2], data[2:]], [(data, torch.zeros(5))], iter([data.numpy()])):
        assert torch.equal(load_images(source, (1, *SHAPE)).values, data)
    found = load_images([data[:2], data[2:]], (1, *SHAPE), limit=3)
    assert len(found.values) == 3 and "first 3" in found.source
    assert "3 of 5" in load_images(data, (1, *SHAPE), limit=3).source


def test_synthesized_images_are_reproducible():
    first, second = (load_images(None, (1, *SHAPE), {"mean": (0, 0, 0), "std": (1, 1, 1)}) for _ in range(2))
    assert torch.equal(first.values, second.values) and "synthesized" in first.source
    assert first.values.min() >= 0 and first.values.max() <= 1
    assert not torch.equal(first.values, load_images(None, (1, *SHAPE), seed=1).values)


def test_folder(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "b").mkdir()
    for name in ("b/2.png", "1.jpg", "3.png"):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = load_images(tmp_path, (1, *SHAPE), {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0})
    assert found.ids == ["1.jpg", "3.png", "b/2.png"] and found.values.shape == (3, *SHAPE)
    some = load_images(str(tmp_path), (1, *SHAPE), limit=2)
    assert len(set(some.ids)) == 2 and set(some.ids) < set(found.ids) and "2 of 3" in some.source
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(VitqError, match=r"broken\.png"):
        load_images(tmp_path, (1, *SHAPE))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, *SHAPE), np.uint8), "normaliz"),
        (np.zeros((2, *SHAPE), np.float64), "float64"),
        (np.zeros((2, *SHAPE), np.int64), "int64"),
        (np.zeros((2, 16, 16, 3), np.float32), "shape"),
        (np.zeros(SHAPE, np.float32), "shape"),
        (np.zeros((0, *SHAPE), np.float32), "no calibration images"),
        (np.full((2, *SHAPE), np.nan, np.float32), "NaN"),
        (torch.full((2, *SHAPE), torch.inf), "image 0"),
        ([], "empty"),
        ([torch.zeros(2, *SHAPE), torch.zeros(2, 3, 8, 8)], "batch 1"),
        (["a.png"], "batch 0"),
        (7, "int"),
        ("no/such/folder", "no such folder"),
    ],
)
def test_wrong_calibration_data(data, message):
    with pytest.raises(VitqError, match=message):
        load_images(data, (1, *SHAPE))


def test_folder_without_images(tmp_path):
    with pytest.raises(VitqError, match="holds no images"):
        load_images(tmp_path, (1, *SHAPE))


def test_modules_are_left_alone():
    mod = tiny_vit()
    before = Executor(mod).run(images())
    folded(mod)
    assert isinstance(mod, IRModule) and torch.equal(Executor(mod).run(images()), before)
