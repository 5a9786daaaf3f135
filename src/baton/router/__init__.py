"""Which worker gets a request, and how it is sent there: registry, health, policies, dispatch, a lean HTTP client.

Knows nothing of text or tokens: a body is bytes, a load is an estimate.
"""
