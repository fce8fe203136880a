"""Official names of the tensors of DAB-DETR and DAB-Deformable-DETR, as tables of `deformlit.checkpoints`: our name, then theirs."""
import tables_two      # noqa: first, for a class that descends from another comes before it
from deformlit.checkpoints import TABLES
from deformlit.dab_detr import DABDETR, DABDeformableDETR, TwoStageDABDeformableDETR

dab_detr_official = '''
backbone.{*}                                  backbone.0.body.{*}
neck.conv.{p}                                 input_proj.{p}
neck.position.row.weight                      backbone.1.row_embed.weight
neck.position.col.weight                      backbone.1.col_embed.weight
encoder.scale.0.{p}                           transformer.encoder.query_scale.layers.0.{p}
encoder.scale.2.{p}                           transformer.encoder.query_scale.layers.1.{p}
encoder.norm.{p}                              transformer.encoder.norm.{p}
encoder.layers.{i}.attn.q_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.k_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.v_proj.{p}            transformer.encoder.layers.{i}.self_attn.in_proj_{p} @0
encoder.layers.{i}.attn.out_proj.{p}          transformer.encoder.layers.{i}.self_attn.out_proj.{p}
encoder.layers.{i}.residual1.norm.{p}          transformer.encoder.layers.{i}.norm1.{p}
encoder.layers.{i}.residual2.norm.{p}          transformer.encoder.layers.{i}.norm2.{p}
encoder.layers.{i}.ffn.linear1.{p}            transformer.encoder.layers.{i}.linear1.{p}
encoder.layers.{i}.ffn.linear2.{p}            transformer.encoder.layers.{i}.linear2.{p}
encoder.layers.{i}.ffn.act.weight             transformer.encoder.layers.{i}.activation.weight
queries.anchors.logits.weight                 refpoint_embed.weight
queries.anchors.xy                            refpoint_embed.weight @1
queries.anchors.wh                            refpoint_embed.weight @1
queries.content.patterns.weight               transformer.patterns.weight
decoder.position.mlp.0.{p}                    transformer.decoder.ref_point_head.layers.0.{p}
decoder.position.mlp.2.{p}                    transformer.decoder.ref_point_head.layers.1.{p}
decoder.position.scale.mlp.0.{p}              transformer.decoder.query_scale.layers.0.{p}
decoder.position.scale.mlp.2.{p}              transformer.decoder.query_scale.layers.1.{p}
decoder.position.scale.factors.weight         transformer.decoder.query_scale.weight
decoder.position.modulation.asked.0.{p}       transformer.decoder.ref_anchor_head.layers.0.{p}
decoder.position.modulation.asked.2.{p}       transformer.decoder.ref_anchor_head.layers.1.{p}
decoder.layers.{i}.self_attn.q_content.{p}    transformer.decoder.layers.{i}.sa_qcontent_proj.{p}
decoder.layers.{i}.self_attn.q_position.{p}   transformer.decoder.layers.{i}.sa_qpos_proj.{p}
decoder.layers.{i}.self_attn.k_content.{p}    transformer.decoder.layers.{i}.sa_kcontent_proj.{p}
decoder.layers.{i}.self_attn.k_position.{p}   transformer.decoder.layers.{i}.sa_kpos_proj.{p}
decoder.layers.{i}.self_attn.v_proj.{p}       transformer.decoder.layers.{i}.sa_v_proj.{p}
decoder.layers.{i}.self_attn.out_proj.{p}     transformer.decoder.layers.{i}.self_attn.out_proj.{p}
decoder.layers.{i}.cross_attn.q_content.{p}   transformer.decoder.layers.{i}.ca_qcontent_proj.{p}
decoder.layers.{i}.cross_attn.q_position.{p}  transformer.decoder.layers.{i}.ca_qpos_proj.{p}
decoder.layers.{i}.cross_attn.q_place.{p}     transformer.decoder.layers.{i}.ca_qpos_sine_proj.{p}
decoder.layers.{i}.cross_attn.k_content.{p}   transformer.decoder.layers.{i}.ca_kcontent_proj.{p}
decoder.layers.{i}.cross_attn.k_place.{p}     transformer.decoder.layers.{i}.ca_kpos_proj.{p}
decoder.layers.{i}.cross_attn.v_proj.{p}      transformer.decoder.layers.{i}.ca_v_proj.{p}
decoder.layers.{i}.cross_attn.out_proj.{p}    transformer.decoder.layers.{i}.cross_attn.out_proj.{p}
decoder.layers.{i}.norm1.{p}                  transformer.decoder.layers.{i}.norm1.{p}
decoder.layers.{i}.norm2.{p}                  transformer.decoder.layers.{i}.norm2.{p}
decoder.layers.{i}.ffn.norm.{p}               transformer.decoder.layers.{i}.norm3.{p}
decoder.layers.{i}.ffn.linear1.{p}            transformer.decoder.layers.{i}.linear1.{p}
decoder.layers.{i}.ffn.linear2.{p}            transformer.decoder.layers.{i}.linear2.{p}
decoder.layers.{i}.ffn.act.weight             transformer.decoder.layers.{i}.activation.weight
heads.norm.{p}                                transformer.decoder.norm.{p}
heads.classes.{p}                             class_embed.{p}
heads.boxes.mlp.0.{p}                         bbox_embed.layers.0.{p}
heads.boxes.mlp.2.{p}                         bbox_embed.layers.1.{p}
heads.boxes.mlp.4.{p}                         bbox_embed.layers.2.{p}
heads.steps.mlp.0.{p}                         bbox_embed.layers.0.{p} = transformer.decoder.bbox_embed.layers.0.{p}
heads.steps.mlp.2.{p}                         bbox_embed.layers.1.{p} = transformer.decoder.bbox_embed.layers.1.{p}
heads.steps.mlp.4.{p}                         bbox_embed.layers.2.{p} = transformer.decoder.bbox_embed.layers.2.{p}
heads.boxes.mlps.{i}.0.{p}                    bbox_embed.{i}.layers.0.{p}
heads.boxes.mlps.{i}.2.{p}                    bbox_embed.{i}.layers.1.{p}
heads.boxes.mlps.{i}.4.{p}                    bbox_embed.{i}.layers.2.{p}
heads.steps.mlps.{i}.0.{p}                    bbox_embed.{i}.layers.0.{p} = transformer.decoder.bbox_embed.{i}.layers.0.{p}
heads.steps.mlps.{i}.2.{p}                    bbox_embed.{i}.layers.1.{p} = transformer.decoder.bbox_embed.{i}.layers.1.{p}
heads.steps.mlps.{i}.4.{p}                    bbox_embed.{i}.layers.2.{p} = transformer.decoder.bbox_embed.{i}.layers.2.{p}
'''

dab_deformable_official = '''
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
decoder.position.mlp.0.{p}                    transformer.decoder.ref_point_head.layers.0.{p}
decoder.position.mlp.2.{p}                    transformer.decoder.ref_point_head.layers.1.{p}
decoder.position.scale.mlp.0.{p}              transformer.decoder.query_scale.layers.0.{p}
decoder.position.scale.mlp.2.{p}              transformer.decoder.query_scale.layers.1.{p}
queries.anchors.logits.weight                 refpoint_embed.weight
queries.anchors.xy                            refpoint_embed.weight @1
queries.anchors.wh                            refpoint_embed.weight @1
queries.content.content.weight                tgt_embed.weight
queries.content.patterns.weight               patterns_embed.weight
heads.head.classes.{p}                        class_embed.{each}.{p}
heads.head.box.0.{p}                          bbox_embed.{each}.layers.0.{p}
heads.head.box.2.{p}                          bbox_embed.{each}.layers.1.{p}
heads.head.box.4.{p}                          bbox_embed.{each}.layers.2.{p}
heads.heads.{i}.classes.{p}                   class_embed.{i}.{p}
heads.heads.{i}.box.0.{p}                     bbox_embed.{i}.layers.0.{p} = transformer.decoder.bbox_embed.{i}.layers.0.{p}
heads.heads.{i}.box.2.{p}                     bbox_embed.{i}.layers.1.{p} = transformer.decoder.bbox_embed.{i}.layers.1.{p}
heads.heads.{i}.box.4.{p}                     bbox_embed.{i}.layers.2.{p} = transformer.decoder.bbox_embed.{i}.layers.2.{p}
'''

# the official two-stage model has these names and crashes: weights in this layout are ours
two_stage_dab_deformable_official = '''
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
decoder.position.mlp.0.{p}                    transformer.decoder.ref_point_head.layers.0.{p}
decoder.position.mlp.2.{p}                    transformer.decoder.ref_point_head.layers.1.{p}
decoder.position.scale.mlp.0.{p}              transformer.decoder.query_scale.layers.0.{p}
decoder.position.scale.mlp.2.{p}              transformer.decoder.query_scale.layers.1.{p}
queries.token_proj.{p}                        transformer.enc_output.{p}
queries.token_norm.{p}                        transformer.enc_output_norm.{p}
queries.query_proj.{p}                        transformer.pos_trans.{p}
queries.query_norm.{p}                        transformer.pos_trans_norm.{p}
heads.heads.{i}.classes.{p}                   class_embed.{i}.{p} = transformer.decoder.class_embed.{i}.{p}
heads.heads.{i}.box.0.{p}                     bbox_embed.{i}.layers.0.{p} = transformer.decoder.bbox_embed.{i}.layers.0.{p}
heads.heads.{i}.box.2.{p}                     bbox_embed.{i}.layers.1.{p} = transformer.decoder.bbox_embed.{i}.layers.1.{p}
heads.heads.{i}.box.4.{p}                     bbox_embed.{i}.layers.2.{p} = transformer.decoder.bbox_embed.{i}.layers.2.{p}
'''

TABLES['official'] = {TwoStageDABDeformableDETR: two_stage_dab_deformable_official, DABDeformableDETR: dab_deformable_official, DABDETR: dab_detr_official,
                      **TABLES['official']}    # before the classes they descend from
