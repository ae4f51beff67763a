"""The staged retention program: what is resident when each stage of the backward starts."""
