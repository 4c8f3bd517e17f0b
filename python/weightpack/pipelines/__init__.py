"""Pipelines of diffusers as a whole: packed component by component while they are loaded, saved in one step."""
