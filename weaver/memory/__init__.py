"""What a run takes on the device, known before anything is loaded; and plans that take less.

`ledger` is a device without numbers; `answers`, `scratch` and `shape_rules` are what it knows of operations. `shapes`
are models without weights, `stages` and `training` a job's stages run on it, with `stand_ins` for what its files hold
and `captures` for CUDA graphs.
`estimate` and `table` are the result, `plans` the ways to run, `resting` how parts are kept off the device, and
`feature_home` where features go in a run that no plan was made for.
"""
