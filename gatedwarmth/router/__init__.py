"""Routers: from a conversation to the probability that its last turn is social."""


def load_router(folder):  # placeholder until text.py exists
    raise NotImplementedError
