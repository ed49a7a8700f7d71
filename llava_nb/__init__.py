"""Learn and run LLaVA visual instruction tuning."""
__version__ = "0.1.0"
