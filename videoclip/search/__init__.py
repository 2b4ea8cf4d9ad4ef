"""An archive's moments, found by describing them: what was shown and what was said, searched together.

`store` keeps videos, lines and words in one SQLite file; `windows` their vectors, on Faiss; `words` turns a query into
full-text search; `fusion` joins the two by rank; `archive` answers a `request`; `answers` writes answers down for
people, programs and editors; `building` grows and shrinks the whole.
"""
