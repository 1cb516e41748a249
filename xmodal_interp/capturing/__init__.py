"""Run a model on images and questions, and turn its recorded calls into samples."""
