"""Damaged and hostile files for every reader of files that a user may have downloaded, copied or edited: `make fuzz`.

mutations   bytes that are flipped, cut, spliced …, and JSON and YAML with something wrong in it
forms       files (safetensors, zip, tar, pickle …) that are right but for one thing in them
jail        child processes with bounds, in which a reader gets one such input after the other, and the verdicts
models      the readers of nets: weight files, run folders, manifests, plans, other people's pickles
runs        the readers of what a run leaves or is told: recipes, checkpoints, summaries, curves, references
pictures    the readers of images
suite       all readers, and how many inputs each gets
"""
