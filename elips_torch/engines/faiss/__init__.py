"""The only folder that imports faiss."""
