"""stub"""
from pipelines.store import Store
def render(store: Store, run: str) -> str:
    return "<html></html>"
