"""Models and what runs on them: family-free code here, one folder for each model family."""
