//! What is printed and written when a guest crashes.
