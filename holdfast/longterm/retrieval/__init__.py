"""What finds memories: encodings, indexes of vectors and words, graphs, and their fusion."""
