"""What ``demo`` and ``check-cuda`` measure, and the models they do it on."""
