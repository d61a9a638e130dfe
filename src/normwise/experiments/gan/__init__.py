"""The GAN study: strategies × losses."""
