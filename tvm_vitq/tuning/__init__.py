"""Autotuning: kernels of a model under many schedules, measured on the device they are for.

tasks      which kernels a model has, each with operands and what numerics.py says they give
candidates schedules as MetaSchedule sees them: sampled decisions, and features for the cost model
workers    what runs in processes of its own: building a candidate, checking and timing it
measuring  MetaSchedule's builder and runner on top of these
records    what was found, in files: written at once, read by `tvm_vitq.compile`
search     the run: MetaSchedule's task scheduler, evolutionary search and xgboost model
"""
