"""The student model: built or loaded, checked, adapted (LoRA), its vocabulary compared."""
