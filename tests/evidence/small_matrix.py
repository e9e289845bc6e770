"""A matrix in which everything is small."""

MATRIX = """
recipe: shapes_h200
base: [data]
common: [launch.device=cpu, launch.mixed_precision=no, data.frames=5]
prompts: 2
seeds: 2
real: 4
batch_size: 4
cells:
  teacher:
    title: the teacher
    group: teacher
    network: teacher
    rows:
      s2: {sampler: teacher, steps: 2}
  sla010: {title: SLA, group: sla, stage: sla, train: [attention.topk=0.1], rows: {s2: {sampler: teacher, steps: 2}}}
  turbo:
    title: Turbo
    group: turbo
    stage: rcm
    train: ['model.sla=<sla010>', sla.steps=3]
    rows:
      s1: {steps: 1}
      int8_4: {steps: 4, quantize: {scheme: int8_channel}, label: Turbo in int8}
  copy: {title: a copy, group: turbo, network: turbo, rows: {s1: {steps: 1}}}
"""
