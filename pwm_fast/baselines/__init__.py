"""Learners that extraction is compared with, and that make its data. SHAC trains through the differentiable simulator:
`shac` is the algorithm, `shac_training` a run of it (`train_shac`), `shac_collection` a run that is recorded."""
