"""How results are shown: HTML pages, plots, images, folder layouts, the terminal."""
