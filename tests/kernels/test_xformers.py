"""The xformers backend: its reasons, and that a (B, S, H, D) kernel gets the right views."""

import types
from types import SimpleNamespace

import pytest
import torch

from ddb_fast.kernels import attention, attention_qkv, reference, xformers_backend


def test_reasons():
    q = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    reasons = xformers_backend.why_not("attention", q, q, q)
    assert any("CUDA tensors" in reason and "cpu" in reason for reason in reasons)
    assert any("float64" in reason for reason in reasons)
    assert any("multiple of 8, it is 12" in reason for reason in reasons)
    packed = torch.randn(1, 5, 3 * 2 * 12)
    assert any("it is 12" in r for r in xformers_backend.why_not("attention_qkv", packed, 2))
    assert xformers_backend.why_not("group_norm") == ["xformers has no group norm"]
    with pytest.raises(ValueError, match=r"'xformers' cannot run this: .*CUDA tensors"):
        attention(q, q, q, backend="xformers")


def test_a_failing_import_is_a_reason(monkeypatch):
    def broken(name):
        raise ImportError(f"{name}:\n  built for another torch")

    monkeypatch.setattr(xformers_backend, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers_backend, "import_module", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    xformers_backend._import_failure.cache_clear()
    reason = "xformers cannot be used: xformers.ops: built for another torch"
    assert xformers_backend.why_not("attention") == [reason]
    xformers_backend._import_failure.cache_clear()


def test_operators_that_do_not_load_are_a_reason(monkeypatch):
    """Beside another torch than its own, xformers is imported without them."""
    failed = OSError("undefined symbol:\n  at::native")
    library = SimpleNamespace(_cpp_library_load_exception=failed)
    packages = {"xformers.ops": object(), "xformers._cpp_lib": library}
    monkeypatch.setattr(xformers_backend, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers_backend, "import_module", packages.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    xformers_backend._import_failure.cache_clear()
    reason = "xformers cannot be used: undefined symbol: at::native"
    assert xformers_backend.why_not("attention") == [reason]
    xformers_backend._import_failure.cache_clear()


def test_views(monkeypatch):
    """A stand-in with xformers' layout (B, S, H, D), in plain loops over batch and heads."""

    def memory_efficient_attention(q, k, v, scale):
        assert q.shape == (2, 5, 3, 8) and k.shape == v.shape == (2, 7, 3, 8)
        o = torch.empty_like(q)
        for b in range(2):
            for h in range(3):
                weights = torch.softmax(q[b, :, h] @ k[b, :, h].T * scale, -1)
                o[b, :, h] = weights @ v[b, :, h]
        return o

    module = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(xformers_backend, "import_module", lambda name: module)
    monkeypatch.setattr(xformers_backend, "why_not", lambda op, *arguments: [])
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    o = xformers_backend.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(o, reference.attention(q, k, v, scale=0.3))


def test_packed(monkeypatch):
    def memory_efficient_attention(q, k, v, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference.attention(q, k, v, scale=scale).transpose(1, 2)

    module = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(xformers_backend, "import_module", lambda name: module)
    packed = torch.randn(2, 5, 3 * 3 * 8)
    o = xformers_backend.attention_qkv(packed, 3, scale=None)
    torch.testing.assert_close(o, attention_qkv(packed, 3, backend="reference"))
    assert o.shape == (2, 5, 24) and o.is_contiguous()
