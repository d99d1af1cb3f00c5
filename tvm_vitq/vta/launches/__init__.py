"""What a model has VTA do in one run: layers, attention in front of and behind the softmax, residual sums."""
