"""Our two-stage Deformable DETR against that of transformers, with random weights, layer by layer; and where theirs departs from the official code."""
import os
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
transformers = pytest.importorskip('transformers')
from torch.testing import assert_close

from deformlit.backbones import Bottleneck, ResNet
from deformlit.deformable_detr import class_zero, grid_proposals, two_stage_detr
from deformlit.set_loss import Matcher, SetLoss, set_losses
from test_transformers import disturb, translate

DIM, LEVELS, CLASSES, LAYERS, QUERIES = 256, 4, 7, 2, 11      # their sine of proposals is written for 256 channels
TWO_STAGE = {'enc_output.': 'queries.token_proj.', 'enc_output_norm.': 'queries.token_norm.', 'pos_trans.': 'queries.query_proj.', 'pos_trans_norm.': 'queries.query_norm.'}

def config(**kwargs):
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=['stage2', 'stage3', 'stage4'])
    return transformers.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, num_labels=CLASSES, d_model=DIM, num_feature_levels=LEVELS,
        encoder_layers=1, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_n_points=2, decoder_n_points=2, num_queries=QUERIES, two_stage=True, two_stage_num_proposals=QUERIES, with_box_refine=True, auxiliary_loss=True, **kwargs)

@pytest.fixture(scope='module')
def pair():
    "Their model with noise on every tensor, and ours with its weights; theirs ranks dead tokens too, so ours does here."
    torch.manual_seed(0)
    theirs = transformers.DeformableDetrForObjectDetection(config(class_cost=2))
    disturb(theirs)
    ours = two_stage_detr(CLASSES, ResNet(Bottleneck, (1, 1, 1, 1), (4, 6, 8, 12), stem=8), dim=DIM, num_heads=4, num_levels=LEVELS, num_points=2, num_queries=QUERIES,
                          num_encoder_layers=1, num_decoder_layers=LAYERS, dim_ffn=32)
    state = translate(theirs.state_dict(), True)
    state = {next((new + n.removeprefix(old) for old, new in TWO_STAGE.items() if n.startswith(old)), n): t for n, t in state.items()}
    ours.load_state_dict(state)             # strict: every name has its place
    ours.queries.rank = class_zero
    return theirs.eval(), ours.eval()

def inputs():
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:], mask[1, :, 120:] = True, True              # the second image is smaller
    return images.masked_fill(mask[:, None], 0), mask

def test_same_proposals_states_and_boxes(pair):
    theirs, ours = pair
    images, mask = inputs()
    seen = dict(pyramid=[], memory=[], states=[], start=[], references=[])
    hooks = [ours.neck.register_forward_hook(lambda m, args, out: seen['pyramid'].append(out)), ours.encoder.register_forward_hook(lambda m, args, out: seen['memory'].append(out)),
             ours.queries.register_forward_hook(lambda m, args, out: seen['start'].append(out[0])), ours.heads.register_forward_hook(lambda m, args, out: seen['references'].append(out[2]))]
    hooks += [layer.register_forward_hook(lambda m, args, out: seen['states'].append(out)) for layer in ours.decoder.layers]
    with torch.no_grad(): preds, out = ours(images, mask), theirs(images, pixel_mask=(~mask).long())
    for h in hooks: h.remove()
    close = lambda a, b: assert_close(a, b, rtol=0, atol=2e-5)
    p, = seen['pyramid']
    dead = grid_proposals(p)[1]
    close(seen['memory'][0][~p.mask], out.encoder_last_hidden_state[~p.mask])
    close(preds.proposals.logits[:, 0], out.enc_outputs_class)
    close(preds.proposals.boxes[:, 0], out.enc_outputs_coord_logits.sigmoid())
    assert dead.any() and not dead.all(1).any() and torch.equal(dead, out.enc_outputs_coord_logits.isinf().all(-1))
    close(seen['start'][0].reference, out.init_reference_points)
    close(torch.stack(seen['states'], 1), out.intermediate_hidden_states)
    close(torch.stack(seen['references'][1:], 1), out.intermediate_reference_points)
    close(preds.logits[:, -1], out.logits)
    close(preds.boxes[:, -1], out.pred_boxes)
    assert min(preds.boxes[:, -1].std(1).min(), preds.logits[:, -1].std(1).min()) > 1e-3     # not a comparison of constants

def targets():
    boxes = torch.tensor([[[.3, .4, .2, .3], [.6, .6, .3, .2]], [[.5, .5, .4, .4], [0, 0, 0, 0]]])
    labels = torch.tensor([[2, 5], [1, -1]])
    return boxes, labels, [dict(class_labels=c[c >= 0], boxes=b[c >= 0]) for b, c in zip(boxes, labels)]

def test_their_proposal_head_learns_nothing_and_ours_does(pair):
    "Their loss does not look at the proposals: the first stage keeps its random weights for ever. Ours pays for them, as the official loss does."
    theirs, ours = pair
    (images, mask), (boxes, labels, dicts) = inputs(), targets()
    for m in pair: m.zero_grad()
    theirs(images, pixel_mask=(~mask).long(), labels=dicts).loss.backward()
    grads = {n: w.grad for n, w in theirs.named_parameters()}
    untrained = {'model.enc_output.weight', 'model.enc_output_norm.weight', f'class_embed.{LAYERS}.weight', f'bbox_embed.{LAYERS}.layers.2.weight'}
    found = {n: g for n, g in grads.items() if any(n.endswith(o) for o in untrained)}
    assert len(found) >= 4 and all(g is None or not g.any() for g in found.values())
    SetLoss()(ours(images, mask), boxes, labels).backward()
    head = ours.heads.heads[-1]
    for w in (ours.queries.token_proj.weight, ours.queries.token_norm.weight, head.classes.weight, head.box[-1].weight): assert w.grad.any()

def test_their_weights_are_not_the_official_ones(pair):
    "Term by term the losses agree; theirs weigh the class 1 (official 2) and leave out the proposals. Their default matching cost of the class is 1 (official 2)."
    theirs, ours = pair
    (images, mask), (boxes, labels, dicts) = inputs(), targets()
    loss = SetLoss()
    with torch.no_grad():
        out, preds = theirs(images, pixel_mask=(~mask).long(), labels=dicts), ours(images, mask)
        total = loss(preds, boxes, labels)
        parts = set_losses(loss.classify, *preds[:2], boxes, labels, loss.pairs, 3)
    for layer in range(LAYERS):
        suffix = '' if layer == LAYERS - 1 else f'_{layer}'
        for mine, name in (('class', 'loss_ce'), ('box', 'loss_bbox'), ('giou', 'loss_giou')): assert_close(parts[mine][layer], out.loss_dict[name + suffix], rtol=1e-4, atol=1e-4)
    assert not [n for n in out.loss_dict if n.endswith('_enc')]
    summed = {name: o.sum() for name, o in parts.items()}
    assert_close(out.loss, 1 * summed['class'] + 5 * summed['box'] + 2 * summed['giou'], rtol=1e-4, atol=1e-3)
    assert_close(total, 2 * summed['class'] + 5 * summed['box'] + 2 * summed['giou'] + loss.parts['proposals'], rtol=1e-4, atol=1e-3)
    assert total > out.loss + 1
    assert transformers.DeformableDetrConfig().class_cost == 1 and Matcher().class_cost == 2 and loss.weights == {'class': 2., 'box': 5., 'giou': 2.}

def test_their_first_weights_are_not_the_official_ones():
    "Theirs says 50 % for every class of every query, and random boxes; ours 1 % and the proposals themselves."
    torch.manual_seed(0)
    theirs, ours = transformers.DeformableDetrForObjectDetection(config()), two_stage_detr(CLASSES, ResNet(Bottleneck, (1, 1, 1, 1), (4, 6, 8, 12), stem=8), num_queries=QUERIES)
    for head in theirs.class_embed: assert not head.bias.any()
    for head in theirs.bbox_embed: assert head.layers[-1].weight.any()
    for head in ours.heads.heads:
        assert_close(head.classes.bias.sigmoid(), torch.full((CLASSES,), 0.01))
        assert not head.box[-1].weight.any() and not head.box[-1].bias.any()
