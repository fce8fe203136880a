"""Weights and images by a formula, so that a model of full size can be compared with the official code without a file: numbers that follow from the official names alone."""
import zlib
import numpy as np
import torch

TABLES = 'rpe_table', 'relative_position_bias_table', '.rpb'

def spread(n:int, seed:int):
    "`n` numbers in [-0.5, 0.5), float64, that look random."
    x = np.arange(n, dtype=np.uint32) + np.uint32(seed)
    for shift, factor in ((16, 0x85ebca6b), (13, 0xc2b2ae35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x / 2.**32 - .5

def named(name:str, shape): return torch.tensor(spread(int(np.prod(shape)), zlib.crc32(name.encode()))).view(tuple(shape))

def weight(name:str, t):
    "The tensor of this official name."
    if not t.is_floating_point() or name.endswith('attn_mask'): return t
    u = named(name, t.shape)
    if name.endswith('running_var'): u = 1 + u
    elif name.endswith(TABLES): u = 2 * u
    elif t.ndim >= 2: u = 2 * u * (3 / t[0].numel())**.5
    elif name.endswith('.weight'): u = 1 + .4 * u
    else: u = .4 * u
    return u.to(t.dtype)

def weights(state:dict) -> dict: return {name: weight(name, t) for name, t in state.items()}

def image(*shape, name='input'): return named(name, shape) * 12**.5
