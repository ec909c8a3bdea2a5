"""Imports of training ranks, made once in the process that they are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported

import deepspeed.runtime.engine
import peft
import torch
import transformers.models.llama.modeling_llama

import trainer.engine.deepspeed_engine
import trainer.engine.train_step
import trainer.evaluation.held_out
import trainer.run.bad_batch
import trainer.run.worker
import trainer.student.build

__all__ = ["deepspeed", "peft", "torch", "trainer", "transformers"]
