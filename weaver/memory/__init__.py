"""What a run takes on the device, known before anything is loaded; and plans that take less.

`ledger` a device without numbers, `answers` and `scratch` its two tables, `shapes` models without weights, `stages` and
`training` a job's stages run on it, `estimate` the result, `plans` the choice that fits, `resting` parts off the device.
"""
