"""Training of adapters and routers, one runnable module each."""
