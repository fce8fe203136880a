"""Official names of DETR's tensors."""
from deformlit.checkpoints import TABLES
from deformlit.detr import DETR

detr_official = '''
backbone.{*}                                  backbone.0.body.{*}
neck.conv.{p}                                 input_proj.{p}
neck.position.row.weight                      backbone.1.row_embed.weight
neck.position.col.weight                      backbone.1.col_embed.weight
encoder.layers.{i}.attn.q_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.k_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.v_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.out_proj.{p}          transformer.encoder.layers.{i}.self_attn.out_proj.{p}
encoder.layers.{i}.residual1.norm.{p}         transformer.encoder.layers.{i}.norm1.{p}
encoder.layers.{i}.residual2.norm.{p}         transformer.encoder.layers.{i}.norm2.{p}
encoder.layers.{i}.ffn.linear1.{p}            transformer.encoder.layers.{i}.linear1.{p}
encoder.layers.{i}.ffn.linear2.{p}            transformer.encoder.layers.{i}.linear2.{p}
encoder.norm.{p}                              transformer.encoder.norm.{p}
queries.position.weight                       query_embed.weight
decoder.layers.{i}.self_attn.q_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.k_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.v_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.out_proj.{p}     transformer.decoder.layers.{i}.self_attn.out_proj.{p}
decoder.layers.{i}.cross_attn.q_proj.{p}      transformer.decoder.layers.{i}.multihead_attn.in_proj_{p} @0
decoder.layers.{i}.cross_attn.k_proj.{p}      transformer.decoder.layers.{i}.multihead_attn.in_proj_{p} @0
decoder.layers.{i}.cross_attn.v_proj.{p}      transformer.decoder.layers.{i}.multihead_attn.in_proj_{p} @0
decoder.layers.{i}.cross_attn.out_proj.{p}    transformer.decoder.layers.{i}.multihead_attn.out_proj.{p}
decoder.layers.{i}.residual1.norm.{p}         transformer.decoder.layers.{i}.norm1.{p}
decoder.layers.{i}.residual2.norm.{p}         transformer.decoder.layers.{i}.norm2.{p}
decoder.layers.{i}.residual3.norm.{p}         transformer.decoder.layers.{i}.norm3.{p}
decoder.layers.{i}.ffn.linear1.{p}            transformer.decoder.layers.{i}.linear1.{p}
decoder.layers.{i}.ffn.linear2.{p}            transformer.decoder.layers.{i}.linear2.{p}
decoder.norm.{p}                              transformer.decoder.norm.{p}
heads.classes.{p}                             class_embed.{p}
heads.box.0.{p}                               bbox_embed.layers.0.{p}
heads.box.2.{p}                               bbox_embed.layers.1.{p}
heads.box.4.{p}                               bbox_embed.layers.2.{p}
'''
TABLES['official'][DETR] = detr_official
