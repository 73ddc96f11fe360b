"""Books whose codes are computed. A number is a book's when it lies in one of its ranges and was not passed over."""
