"""Official names of a two-stage Deformable DETR's tensors, as a table of `deformlit.checkpoints`: our name, then theirs."""
from deformlit.checkpoints import TABLES
from deformlit.deformable_detr import TwoStageDETR

two_stage_official = '''
backbone.{*}                                  backbone.0.body.{*}
neck.convs.{l}.{j}.{p}                        input_proj.{l}.{j}.{p}
neck.level_embed                              transformer.level_embed
neck.position.row.weight                      backbone.1.row_embed.weight
neck.position.col.weight                      backbone.1.col_embed.weight
encoder.layers.{i}.attn.offsets.{p}           transformer.encoder.layers.{i}.self_attn.sampling_offsets.{p}
encoder.layers.{i}.attn.weights.{p}           transformer.encoder.layers.{i}.self_attn.attention_weights.{p}
encoder.layers.{i}.attn.value_proj.{p}        transformer.encoder.layers.{i}.self_attn.value_proj.{p}
encoder.layers.{i}.attn.out_proj.{p}          transformer.encoder.layers.{i}.self_attn.output_proj.{p}
encoder.layers.{i}.norm.{p}                   transformer.encoder.layers.{i}.norm1.{p}
encoder.layers.{i}.ffn.norm.{p}               transformer.encoder.layers.{i}.norm2.{p}
encoder.layers.{i}.ffn.linear1.{p}            transformer.encoder.layers.{i}.linear1.{p}
encoder.layers.{i}.ffn.linear2.{p}            transformer.encoder.layers.{i}.linear2.{p}
queries.token_proj.{p}                        transformer.enc_output.{p}
queries.token_norm.{p}                        transformer.enc_output_norm.{p}
queries.query_proj.{p}                        transformer.pos_trans.{p}
queries.query_norm.{p}                        transformer.pos_trans_norm.{p}
decoder.layers.{i}.self_attn.q_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.k_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.v_proj.{p}       transformer.decoder.layers.{i}.self_attn.in_proj_{p} @0
decoder.layers.{i}.self_attn.out_proj.{p}     transformer.decoder.layers.{i}.self_attn.out_proj.{p}
decoder.layers.{i}.norm1.{p}                  transformer.decoder.layers.{i}.norm2.{p}
decoder.layers.{i}.cross_attn.offsets.{p}     transformer.decoder.layers.{i}.cross_attn.sampling_offsets.{p}
decoder.layers.{i}.cross_attn.weights.{p}     transformer.decoder.layers.{i}.cross_attn.attention_weights.{p}
decoder.layers.{i}.cross_attn.value_proj.{p}  transformer.decoder.layers.{i}.cross_attn.value_proj.{p}
decoder.layers.{i}.cross_attn.out_proj.{p}    transformer.decoder.layers.{i}.cross_attn.output_proj.{p}
decoder.layers.{i}.norm2.{p}                  transformer.decoder.layers.{i}.norm1.{p}
decoder.layers.{i}.ffn.norm.{p}               transformer.decoder.layers.{i}.norm3.{p}
decoder.layers.{i}.ffn.linear1.{p}            transformer.decoder.layers.{i}.linear1.{p}
decoder.layers.{i}.ffn.linear2.{p}            transformer.decoder.layers.{i}.linear2.{p}
heads.heads.{i}.classes.{p}                   class_embed.{i}.{p} = transformer.decoder.class_embed.{i}.{p}
heads.heads.{i}.box.0.{p}                     bbox_embed.{i}.layers.0.{p} = transformer.decoder.bbox_embed.{i}.layers.0.{p}
heads.heads.{i}.box.2.{p}                     bbox_embed.{i}.layers.1.{p} = transformer.decoder.bbox_embed.{i}.layers.1.{p}
heads.heads.{i}.box.4.{p}                     bbox_embed.{i}.layers.2.{p} = transformer.decoder.bbox_embed.{i}.layers.2.{p}
'''
TABLES['official'] = {TwoStageDETR: two_stage_official, **TABLES['official']}    # before the class it descends from
