"""Which backend runs: precedence, refusals, fallback, and isolation between threads and tasks."""

import asyncio
import functools
import json
import logging
import math
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from ddb_fast.kernels import (
    attention,
    attention_qkv,
    backends,
    dispatch,
    group_norm,
    triton_backend,
    tuned,
    use_backend,
)
from ddb_fast.kernels.dispatch import Backend
from ddb_fast.kernels.tracing import assume_constant_result

X = torch.randn(2, 4, 3, 3)
Q = torch.randn(1, 2, 3, 4)
QKV = torch.randn(1, 3, 24)


def telltale(name, why_not=lambda op, *arguments: []):
    """A backend whose every op returns the name of the backend instead of a tensor."""
    ops = {op: lambda *arguments, **options: name for op in dispatch.OPS}
    return Backend(name, why_not, ops)


def torch_only():
    return next(backend for backend in dispatch.BACKENDS if backend.name == "torch")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice from the environment, nothing logged yet."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    dispatch._environment.cache_clear()
    yield
    dispatch._environment.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Replace the backends; automatic tries them in the order given."""

    def replace(*backends):
        monkeypatch.setattr(dispatch, "BACKENDS", backends)
        names = tuple(backend.name for backend in backends)
        monkeypatch.setattr(dispatch, "automatic", lambda op, *arguments, gradients: names)

    return replace


@pytest.fixture
def telltales(install):
    install(*map(telltale, ("first", "a", "b", "c")))


@pytest.fixture
def measured(monkeypatch):
    """Set what was measured on this machine."""

    def replace(**winners):
        table = {"winners": winners, "configurations": {}}
        monkeypatch.setattr(tuned, "measured", lambda arch: table)
        dispatch._remembered.cache_clear()

    yield replace
    dispatch._remembered.cache_clear()


@pytest.fixture
def environment(monkeypatch):
    def set_to(text):
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, text)
        dispatch._environment.cache_clear()

    return set_to


def test_precedence(telltales, environment):
    assert group_norm(X, 2) == "first"
    environment("group_norm=a")
    assert group_norm(X, 2) == "a"
    with use_backend(group_norm="b"):
        assert group_norm(X, 2) == "b"
        assert group_norm(X, 2, backend="c") == "c"
    assert group_norm(X, 2) == "a"


def test_each_op_has_its_own_choice(telltales, environment):
    environment(" group_norm=a , attention=b,")
    assert group_norm(X, 2) == "a"
    assert attention(Q, Q, Q) == "b"
    assert attention_qkv(QKV, 2) == "b"
    with use_backend(attention="c"):
        assert (group_norm(X, 2), attention(Q, Q, Q), attention_qkv(QKV, 2)) == ("a", "c", "c")


def test_contexts_nest_and_end_with_an_exception(telltales):
    with use_backend(group_norm="a", attention="b"):
        with pytest.raises(KeyError), use_backend(group_norm="c"):
            assert (group_norm(X, 2), attention(Q, Q, Q)) == ("c", "b")
            raise KeyError
        assert group_norm(X, 2) == "a"
    assert group_norm(X, 2) == "first"


def test_decorator(telltales):
    @use_backend(group_norm="b")
    def run(depth):
        return [group_norm(X, 2)] + (run(depth - 1) if depth else [])

    assert run(2) == ["b"] * 3
    assert group_norm(X, 2) == "first"


def test_threads_and_tasks_do_not_see_each_other(telltales):
    seen = []
    with use_backend(group_norm="a"):
        thread = threading.Thread(target=lambda: seen.append(group_norm(X, 2)))
        thread.start()
        thread.join()
    assert seen == ["first"]

    async def task(name):
        with use_backend(group_norm=name):
            await asyncio.sleep(0)
            return group_norm(X, 2)

    async def both():
        return await asyncio.gather(task("b"), task("c"))

    assert asyncio.run(both()) == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("group_norm=tritno", "tritno.*triton, torch"),
        ("attention", "'attention' is not op=backend"),
        ("attention=", "'attention=' is not op=backend"),
        ("conv=torch", "conv=torch.*group_norm, attention"),
    ),
)
def test_a_wrong_environment_is_refused(environment, text, message):
    environment(text)
    with pytest.raises(ValueError, match=message):
        group_norm(X, 2)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="'cuda'; there are: native, triton, torch, xformers, reference"
    ):
        group_norm(X, 2, backend="cuda")
    with pytest.raises(ValueError, match="'cuda'"), use_backend(attention="cuda"):
        pass


def test_asked_for_and_not_possible_gives_the_reasons(install):
    def why_not(op, *arguments):
        return [f"no {op}", *(f"got {type(a).__name__}" for a in arguments)]

    install(telltale("fussy", why_not), *dispatch.BACKENDS)
    message = "group_norm: backend 'fussy' cannot run this: no group_norm; got Tensor; got int"
    with pytest.raises(ValueError, match=message):
        group_norm(X, 2, backend="fussy")
    with pytest.raises(ValueError, match="no attention; got Tensor; got Tensor; got Tensor"):
        attention(Q, Q, Q, backend="fussy")
    with pytest.raises(ValueError, match="no attention_qkv; got Tensor; got int"):
        attention_qkv(QKV, 2, backend="fussy")
    with use_backend(group_norm="fussy"), pytest.raises(ValueError, match="no group_norm"):
        group_norm(X, 2)


def test_automatic_falls_back_and_says_so_once(install, caplog):
    def why_not(op, *arguments):
        return [f"{arguments[0].shape[0]} samples are too few"] if arguments else []

    install(telltale("big", why_not), torch_only())
    with caplog.at_level(logging.INFO, logger="ddb_fast.kernels"):
        for _ in range(3):
            y = group_norm(X, 2)
        attention(Q, Q, Q)
        group_norm(X[:1], 2)
    torch.testing.assert_close(y, group_norm(X, 2, backend="torch"))
    assert caplog.messages == [
        "group_norm: not big, because 2 samples are too few",
        "attention: not big, because 1 samples are too few",
        "group_norm: not big, because 1 samples are too few",
    ]


def test_automatic_with_nothing_left(install):
    refusing = telltale("only", lambda op, *arguments: ["it rains"])
    install(refusing)
    with pytest.raises(ValueError, match="no backend can run this: only: it rains"):
        group_norm(X, 2)


def test_arguments_are_checked_before_the_backend_is_asked(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", (telltale("any"),))
    with pytest.raises(ValueError, match="3 for 4"):
        group_norm(X, 3)


def test_backends_lists_reasons(install):
    listed = backends()
    assert [*listed] == ["group_norm", "attention"]
    for choices in listed.values():
        assert choices["torch"] == [] and choices["reference"] == []
    assert listed["group_norm"]["xformers"] == ["xformers has no group norm"]
    partial = telltale("partial", lambda op, *arguments: [] if op == "group_norm" else ["no GPU"])
    install(partial)
    assert backends() == {"group_norm": {"partial": []}, "attention": {"partial": ["no GPU"]}}


def test_the_choice_and_the_fallback_compile(install, caplog):
    ran = []

    def traced(x, *arguments, **options):
        ran.append("traced")
        return x * 2

    named = Backend("named", lambda op, *arguments: [], {"group_norm": traced})
    refusing = telltale("refusing", lambda op, *arguments: ["never"])
    install(refusing, torch_only(), named)

    def run(x):
        return group_norm(x, 2)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="ddb_fast.kernels"):
        torch.testing.assert_close(compiled(X), group_norm(X, 2, backend="torch"))
    assert caplog.messages == ["group_norm: not refusing, because never"]

    torch._dynamo.reset()
    with use_backend(group_norm="named"):
        assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(X), 2 * X)
    torch._dynamo.reset()


def test_automatic_takes_what_was_measured_fastest(measured):
    assert "reference" not in dispatch.automatic("group_norm", X, 2)[:1]
    here = tuned.group_norm_class(X.dtype, True, X.shape[1:], True)
    there = tuned.group_norm_class(X.dtype, True, X.shape[1:], False)
    tokens = tuned.attention_class(Q.dtype, 3, 4, True)
    measured(group_norm={here: "reference"}, attention={tokens: "xformers"})
    assert dispatch.automatic("group_norm", X, 2)[0] == "reference"
    assert dispatch.automatic("attention", Q, Q, Q) == ("xformers", "native", "torch", "reference")
    assert dispatch.automatic("attention_qkv", QKV, 2)[0] == "xformers"
    with torch.no_grad():
        assert dispatch.automatic("group_norm", X, 2)[0] != "reference"
    measured(group_norm={there: "reference"})
    assert dispatch.automatic("group_norm", X, 2)[0] != "reference"
    # What was measured but cannot run is passed over.
    measured(attention={tokens: "xformers"})
    torch.testing.assert_close(attention(Q, Q, Q), attention(Q, Q, Q, backend="reference"))


def test_on_a_gpu_fp16_wins_where_bf16_does(monkeypatch):
    winners = {"group_norm": {"nhwc/bf16/forward/20": "torch", "nhwc/fp16/forward/21": "triton",
                              "nhwc/bf16/forward/21": "torch"}}  # fmt: skip
    monkeypatch.setattr(tuned, "architecture", lambda device: "any")
    monkeypatch.setattr(tuned, "measured", lambda arch: {"winners": winners})
    gpu = torch.device("cuda", 0)
    assert tuned.winner("group_norm", gpu, "nhwc/fp16/forward/20") == "torch"
    assert tuned.winner("group_norm", gpu, "nhwc/fp16/forward/21") == "triton"
    assert tuned.winner("group_norm", gpu, "nhwc/fp32/forward/20") is None
    assert tuned.winner("group_norm", torch.device("cpu"), "nhwc/fp16/forward/20") is None


def test_the_shipped_table_of_an_h200():
    """What was measured there, read as a network reads it."""
    winners = tuned.measured("sm_90")["winners"]
    assert set(winners["group_norm"].values()) == {"triton"}
    for length, width, forward, backward in (
        (64, 64, "triton", "triton"),
        (256, 64, "torch", "triton"),
        (256, 8, "triton", "triton"),
        (1024, 64, "torch", "torch"),
    ):
        for differentiable, first in ((False, forward), (True, backward)):
            name = tuned.attention_class(torch.bfloat16, length, width, differentiable)
            assert winners["attention"][name] == first
    assert tuned.nearest("sm_100") == "sm_90"


def test_unmeasured_devices_have_their_own_order():
    x = X.to("meta")
    assert dispatch.automatic("group_norm", X, 2)[0] in ("native", "torch")
    assert dispatch.automatic("group_norm", x, 2) == ("triton", "torch", "reference")
    for dtype, length, first in (
        (torch.bfloat16, 128, "triton"),
        (torch.float16, 128, "triton"),
        (torch.bfloat16, 129, "torch"),
        (torch.float32, 128, "torch"),
    ):
        q = torch.empty(1, 2, 4, 4, dtype=dtype, device="meta")
        k = torch.empty(1, 2, length, 4, dtype=dtype, device="meta")
        assert dispatch.automatic("attention", q, k, k)[0] == first
        qkv = torch.empty(1, length, 24, dtype=dtype, device="meta")
        assert dispatch.automatic("attention_qkv", qkv, 2)[0] == first
    assert dispatch.automatic("attention", Q, Q, Q) == ("native", "torch", "reference")


@pytest.mark.parametrize("tiles", (True, False))
def test_on_a_cpu_with_matrix_tiles_bf16_attention_is_torchs(monkeypatch, tiles):
    """Not its gradients while length times width is small, and no other type."""
    monkeypatch.setattr(dispatch, "_TILES", tiles)
    monkeypatch.setattr(tuned, "winner", lambda *_: None)
    dispatch._remembered.cache_clear()
    half = torch.bfloat16
    cases = (  # length, width of a head, dtype, gradients, torch with tiles
        (256, 64, half, True, True), (255, 64, half, True, False), (64, 256, half, True, True),
        (64, 8, half, False, True), (63, 256, half, False, False),
        (256, 64, torch.float32, True, False), (256, 64, torch.float16, False, False),
    )  # fmt: skip
    for length, width, dtype, gradients, torchs in cases:
        first = "torch" if tiles and torchs else "native"
        q = torch.empty(1, 2, 4, width, dtype=dtype)
        k = torch.empty(1, 2, length, width, dtype=dtype)
        qkv = torch.empty(1, length, 3 * 2 * width, dtype=dtype)
        with torch.set_grad_enabled(gradients):
            assert dispatch.automatic("attention", q, k, k)[0] == first
            assert dispatch.automatic("attention_qkv", qkv, 2)[0] == first
    dispatch._remembered.cache_clear()


def test_shape_classes():
    assert tuned.group_norm_class(torch.bfloat16, False, (256, 32, 32), True) == (
        "nhwc/bf16/backward/19"
    )
    assert tuned.group_norm_class(torch.float32, True, (3, 5, 5), False) == "nchw/fp32/forward/9"
    assert tuned.attention_class(torch.float16, 65, 40, False) == "fp16/forward/S128/D64"


@pytest.mark.parametrize(
    ("arch", "nearest"),
    (
        ("sm_90", "sm_90"),
        ("sm_89", "sm_80"),
        ("sm_100", "sm_90"),
        ("sm_75", "sm_80"),
        ("cpu-avx2", "cpu-avx512"),
        ("mps", None),
    ),
)
def test_the_nearest_measured_architecture(arch, nearest, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    assert tuned.nearest(arch) is None
    for name in ("cpu-avx512", "sm_80", "sm_90"):
        (tmp_path / f"{name}.json").write_text('{"device": "a card"}')
    assert tuned.nearest(arch) == nearest


def test_launch_configurations_are_those_of_their_own_architecture(tmp_path, monkeypatch):
    """Blocks for 227 KiB of shared memory do not fit into the 99 KiB of another card."""
    table = {"device": "a card", "winners": {}, "configurations": {"a": {"key": {"num_warps": 8}}}}
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.measured.cache_clear()
    for arch, expected in (("sm_90", {"num_warps": 8}), ("sm_89", None), ("sm_100", None)):
        monkeypatch.setattr(tuned, "architecture", lambda device, arch=arch: arch)
        assert tuned.configuration("a", torch.device("cuda"), "key") == expected
    tuned.measured.cache_clear()


@pytest.mark.parametrize(
    ("arch", "attends"), (("sm_75", False), ("sm_80", True), ("sm_120", True), ("cuda", True))
)
def test_triton_attends_on_tensor_cores_only(arch, attends, monkeypatch):
    """Without them a product is a loop of fp32 FMAs, or is not done compiling after minutes."""
    monkeypatch.setattr(triton_backend, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned, "architecture", lambda device: arch)
    monkeypatch.setattr(triton_backend, "torch_operators_only", lambda x: [])
    q, x = (
        # All that is asked of a tensor; there need not be a GPU.
        SimpleNamespace(
            dtype=t.dtype, shape=t.shape, stride=t.stride, device=torch.device("cuda:0")
        )
        for t in (torch.empty(2, 1, 64, 64, dtype=torch.float16), torch.empty(2, 64, 8, 8))
    )
    reasons = triton_backend.why_not("attention", q, q, q)
    assert triton_backend.why_not("group_norm", x, 2) == []
    old = "its products need tensor cores of compute capability 8.0, this GPU has 7.5"
    assert reasons == ([] if attends else [old])
    assert triton_backend.why_not("attention_qkv") == reasons
    assert triton_backend.why_not("group_norm") == []


@pytest.mark.parametrize(
    ("versions", "works"),
    [(("3.6.0", "2.4.6"), False), (("3.6.0", "2.3.5"), True), (("3.7.1", "2.4.6"), True)],
)
def test_an_interpreter_that_newer_numpy_breaks_is_not_asked(versions, works, monkeypatch):
    pytest.importorskip("triton")
    for name, version in zip(("triton", "numpy"), versions, strict=True):
        monkeypatch.setattr(f"{name}.__version__", version)
    reason = triton_backend._why_no_interpreter()
    assert (reason is None) == works
    monkeypatch.setattr(triton_backend, "_NO_INTERPRETER", reason)
    expected = [] if works else ["the interpreter of Triton before 3.7 needs NumPy before 2.4"]
    assert triton_backend.why_not("group_norm") == expected


def test_env_says_what_was_measured(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda device: "cpu-avx2")
    tuned.measured.cache_clear()
    assert tuned.describe(cpu) == "cpu-avx2: unmeasured"
    (tmp_path / "cpu-avx512.json").write_text('{"device": "an EPYC"}')
    text = "cpu-avx2: unmeasured, as cpu-avx512, measured on an EPYC"
    assert tuned.describe(cpu) == text
    (tmp_path / "cpu-avx2.json").write_text('{"device": "a Xeon"}')
    assert tuned.describe(cpu) == "cpu-avx2: measured on a Xeon"
    tuned.measured.cache_clear()


def test_a_constant_of_the_trace_is_marked_as_torch_marks_it():
    """By a name of torch's own, so that importing the kernels does not import the compiler."""
    theirs, ours = torch.compiler.assume_constant_result(lambda: 1), lambda: 1
    assert assume_constant_result(ours) is ours
    assert vars(ours) == vars(theirs) != {}
    code = "import sys, ddb_fast.kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("op", ("group_norm", "attention"))
@pytest.mark.parametrize("enabled", (False, True))
def test_transforms_get_torchs_own_operators(op, enabled):
    """Else a tangent would be 0 without a word, and a transform or a trace fail."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, 8, 4, 4)

    def ours(x):
        if op == "group_norm":
            return group_norm(x, 2, activation="silu")
        return attention(x, x, x)

    def plain(x):
        return F.silu(F.group_norm(x, 2)) if op == "group_norm" else (x @ x.mT / 2).softmax(-1) @ x

    def squares(f):
        return lambda x: f(x).square().sum()

    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    with torch.set_grad_enabled(enabled):
        close(torch.func.grad(squares(ours))(x), torch.func.grad(squares(plain))(x))
        stacked = torch.stack((x, v))
        close(torch.func.vmap(ours)(stacked), torch.func.vmap(plain)(stacked))
        close(torch.jit.trace(ours, x)(v), plain(v))
        if op == "group_norm":  # torch's attention has none on a CPU, and says so
            y, tangent = torch.func.jvp(plain, (x,), (v,))
            close(torch.func.jvp(ours, (x,), (v,)), (y, tangent))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, v)))
                close(dual.tangent, tangent)
    if not dispatch.native.why_not(op):
        with use_backend(**{op: "native"}), pytest.raises(ValueError, match="own operators"):
            torch.func.grad(squares(ours))(x)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_transforms_of_batches_and_layouts(layout):
    """Ensembles and gradients of each sample, of a batch dimension anywhere."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 8, 4, 5), torch.randn(3, 8)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

    def ours(x, weight):
        return group_norm(x.contiguous(memory_format=layout), 2, weight, activation="silu")

    def plain(x, weight):
        return F.silu(F.group_norm(x, 2, weight))

    if layout is torch.contiguous_format:
        # torch's own `contiguous` knows no other layout in there.
        close(torch.func.vmap(ours)(x, weight), torch.func.vmap(plain)(x, weight))
        across = torch.func.vmap(lambda x: group_norm(x, 2), in_dims=2)(x.transpose(0, 2))
        close(across, torch.func.vmap(lambda x: F.group_norm(x, 2))(x.transpose(1, 2).mT.mT))
    module = torch.nn.Conv2d(8, 8, 1).to(memory_format=layout)

    def loss(f, parameters, x):
        return f(torch.func.functional_call(module, parameters, (x[None],)), weight[0]).sum()

    parameters, norm = dict(module.named_parameters()), lambda x, w: group_norm(x, 2, w)
    each = torch.func.vmap(torch.func.grad(functools.partial(loss, norm)), in_dims=(None, 0))
    truth = torch.func.grad(functools.partial(loss, lambda x, w: F.group_norm(x, 2, w)))
    for number, found in enumerate(each(parameters, x[0])["weight"]):
        close(found, truth(parameters, x[0, number])["weight"])


@pytest.mark.parametrize("op", ("group_norm", "attention"))
def test_a_batch_of_gradients_goes_backward(op):
    """Jacobians by one backward, of a forward pass that knew nothing of it."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 8).to(memory_format=torch.channels_last)

    def ours(x):
        if op == "group_norm":
            return group_norm(x, 1, torch.arange(2.0), activation="silu")
        return attention(x, 2 * x, x)

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(ours, x, vectorize=True), jacobian(ours, x))
    y = ours(x.requires_grad_())
    batch = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, batch, retain_graph=True, is_grads_batched=True)
    for one, dy in zip(found, batch, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, dy, retain_graph=True)[0])


def test_fake_tensors_get_torchs_own_operators():
    """Their shapes are found out without computing anything, outside of torch.compile too."""
    x, q = torch.randn(2, 4, 3, 3), torch.randn(1, 2, 3, 4)
    with FakeTensorMode() as mode:
        y = group_norm(mode.from_tensor(x), 2, activation="silu")
        o = attention(*[mode.from_tensor(q)] * 3)
    assert (y.shape, o.shape) == (x.shape, q.shape)
    assert type(y) is type(o) is not torch.Tensor


@pytest.mark.parametrize("backend", ("reference", "torch", "native"))
def test_numbers_of_any_kind(backend):
    """numpy's and a tensor's are taken, what is no number is one ValueError from every backend."""
    if dispatch.BACKENDS[0].why_not("group_norm") and backend == "native":
        pytest.skip("the C++ operators were not built")
    norm = functools.partial(group_norm, X, backend=backend)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    close(norm(np.int64(2), eps=torch.tensor(0.5)), norm(2, eps=0.5))
    scaled = functools.partial(attention, Q, Q, Q, backend=backend)
    close(scaled(scale=np.float32(0.5)), scaled(scale=0.5))
    for call, told in (
        (lambda: norm(2.0), "num_groups must be an integer, got 2.0"),
        (lambda: norm(2, eps=None), "eps must be a number, got None"),
        (lambda: norm(2, eps=-1), "eps must not be negative, got -1.0"),
        (lambda: norm(2, eps=math.nan), "eps must not be negative, got nan"),
        (lambda: scaled(scale="x"), "scale must be a number, got 'x'"),
        (lambda: attention_qkv(Q[0].repeat(1, 1, 3), 2.0), "num_heads must be an integer, got 2.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            call()
