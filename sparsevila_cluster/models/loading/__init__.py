"""From a checkpoint directory to modules in memory."""
