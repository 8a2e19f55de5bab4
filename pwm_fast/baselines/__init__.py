"""Learners that extraction is compared with, and that make its data. SHAC trains through the differentiable simulator:
`shac` is the algorithm, `shac_training` a run of it (`train_shac`), `shac_collection` a run that is recorded.
Planning: `mppi` is the search, `tdmpc2_planning` plans in a world model (with a prior and a value, `guides`),
`physics_planning` in MuJoCo. `model_free` is SAC, `experts` are Meta-World's scripted ones."""
