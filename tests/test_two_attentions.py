"The figure to move of the tutorial on two deformable attentions: its functions say what they should."
import torch
from test_deformed_keys import function, needs_node

PAGE = 'tutorials/two_deformable_attentions'

@needs_node
def test_cell():
    side, n = 200, 14
    for x, y in ((0, 0), (199.9, 3), (200, 200), (100.1, 57), (-5, 300)):
        col, row = (min(max(int(o / side * n // 1), 0), n - 1) for o in (x, y))
        assert function(PAGE, 'cell', f'cell({x}, {y}, {side}, {n})') == row * n + col

@needs_node
def test_moved_and_most():
    points, weights = torch.randint(0, 200, (3, 24, 2)), torch.randint(0, 999, (24,))
    far = (points[0] - points[2]).float().norm(dim=-1).mean().item()
    assert abs(function(PAGE, 'moved', f'moved({points.flatten(1).tolist()}, 0, 2)') - far) < 1e-4
    largest = weights.sort(descending=True).values.cumsum(0)
    assert function(PAGE, 'most', f'most({weights.tolist()})') == int((largest * 2 < largest[-1]).sum()) + 1
