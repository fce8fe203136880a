"""What does not belong on the page of `05 attend`: fuzzing, dtypes, gradients, compilation, edges."""
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from deformlit.attend import MultiheadAttention, attend, attend_loop, attention_weights
from deformlit.core import ArgumentError


def random_qkv(b, n, q, k, d, dtype=torch.float64):
    return (torch.randn(b, n, size, d, dtype=dtype) for size in (q, k, k))


def official(attn, **kwargs):
    "`nn.MultiheadAttention` with the weights of `attn`."
    theirs = nn.MultiheadAttention(attn.dim, attn.num_heads, batch_first=True, **kwargs).to(attn.q_proj.weight)
    with torch.no_grad():
        for name in ('weight', 'bias'):
            packed = torch.cat([getattr(m, name) for m in (attn.q_proj, attn.k_proj, attn.v_proj)])
            getattr(theirs, f'in_proj_{name}').copy_(packed)
    theirs.out_proj.load_state_dict(attn.out_proj.state_dict())
    return theirs


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 2), n=st.integers(1, 3), q=st.integers(1, 4), k=st.integers(1, 5), d=st.integers(1, 4), seed=st.integers(0, 999))
def test_three_forms_agree(b, n, q, k, d, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(b, n, q, k, d)
    mask = torch.rand(b, k.shape[2]) < 0.4   # sometimes all is padding
    truth = attend_loop(q, k, v, mask)
    assert truth.shape == q.shape and truth.dtype == torch.float64
    assert_close(attend(q, k, v, mask), truth)
    assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None]), truth)


def test_large_scores_do_not_overflow():
    q, k, v = (x * 1000 for x in random_qkv(1, 1, 3, 4, 2))
    assert attend_loop(q, k, v).isfinite().all()
    assert_close(attend(q, k, v), attend_loop(q, k, v))


def test_weights_add_up_to_one_or_zero():
    q, k, _ = random_qkv(3, 2, 4, 5, 3)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2:], mask[2] = True, True
    w = attention_weights(q, k, mask)
    assert w.shape == (3, 2, 4, 5)
    assert_close(w.sum(-1), torch.tensor([1., 1., 0.], dtype=torch.float64).view(3, 1, 1).expand(3, 2, 4))
    assert (w[1, ..., 2:] == 0).all()


def test_gradcheck_with_a_blind_image():
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 1, 2, 3, 2))
    mask = torch.tensor([[False, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask), (q, k, v))


@pytest.mark.parametrize('dim, num_heads', [(8, 1), (8, 8), (12, 3), (32, 4)])
def test_module_equals_pytorch_with_gradients(dim, num_heads):
    torch.manual_seed(0)
    attn = MultiheadAttention(dim, num_heads).double()
    for p in attn.parameters(): nn.init.normal_(p, std=0.3)
    theirs = official(attn)
    q, k, v = (torch.randn(2, size, dim, dtype=torch.float64, requires_grad=True) for size in (4, 6, 6))
    mask = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    ours, ref = attn(q, k, v, mask), theirs(q, k, v, key_padding_mask=mask, need_weights=False)[0]
    assert ours.shape == (2, 4, dim) and ours.dtype == torch.float64
    assert_close(ours, ref)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), torch.autograd.grad(ref.square().sum(), (q, k, v))): assert_close(a, b)
    assert_close(attn.weights(q, k, mask), theirs(q, k, v, key_padding_mask=mask, average_attn_weights=False)[1])


def test_init_bounds():
    torch.manual_seed(0)
    attn, packed = MultiheadAttention(64), nn.MultiheadAttention(64, 8).in_proj_weight
    for m in (attn.q_proj, attn.k_proj, attn.v_proj):
        assert m.weight.abs().max() <= (6 / 256) ** 0.5
        assert_close(m.weight.std(), packed.std(), rtol=0.05, atol=0)
    assert (6 / 256) ** 0.5 < attn.out_proj.weight.abs().max() <= (6 / 128) ** 0.5
    assert all((m.bias == 0).all() for m in attn.children())


def test_attn_drop_only_in_training():
    torch.manual_seed(0)
    attn, x = MultiheadAttention(8, 2, attn_drop=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(attn(x, x, x), attn(x, x, x))
    attn.eval()
    assert_close(attn(x, x, x), attn(x, x, x))


def test_blind_query_in_half_precision():
    attn = MultiheadAttention(8, 2).bfloat16()
    x, mask = torch.randn(2, 3, 8).bfloat16(), torch.ones(2, 3, dtype=torch.bool)
    out = attn(x, x, x, mask)
    assert out.dtype == torch.bfloat16
    assert_close(out, attn.out_proj.bias.expand_as(out))


def test_compiles_without_breaks():
    attn, x = MultiheadAttention(8, 2), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    compiled = torch.compile(attn, backend='eager', fullgraph=True)
    assert_close(compiled(x, x, x, mask), attn(x, x, x, mask))


@pytest.mark.parametrize('argument, call', [
    ('num_heads', lambda a, x: MultiheadAttention(8, 3)),
    ('num_heads', lambda a, x: MultiheadAttention(8, 0)),
    ('q', lambda a, x: a(x[0], x, x)),
    ('q', lambda a, x: a(x[..., :4], x, x)),
    ('k', lambda a, x: a(x, x[:1], x)),
    ('v', lambda a, x: a(x, x, x[:, :2])),
    ('padding_mask', lambda a, x: a(x, x, x, torch.zeros(2, 5))),
    ('padding_mask', lambda a, x: a(x, x, x, torch.zeros(2, 4, dtype=torch.bool))),
    ('v', lambda a, x: attend(x[None], x[None], x[None, :, :2])),
    ('k', lambda a, x: attention_weights(x[None], x[None, ..., :3])),
    ('mask', lambda a, x: attend(x[None], x[None], x[None], torch.zeros(5, dtype=torch.bool))),
])
def test_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError) as e: call(MultiheadAttention(8, 2), torch.randn(2, 5, 8))
    assert e.value.argument == argument
