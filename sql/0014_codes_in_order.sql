-- A book's codes in their order: who lists or exports a book reads one range of this index per page, however large the book
-- or its tenant is. Codes of an upload that has not placed them yet (place below -1) are not in it: nobody may see them, and
-- no page has to step over them.
--
-- Uploads wait while it is built, about a second per million codes. The version before works with this schema.

CREATE INDEX codes_of_a_book ON codes (book_id, code) WHERE place >= -1;

-- A key with all scopes keeps all of them: the new one, `codes:read`, lets it list what it could read code by code. Others
-- get it when somebody makes a key that has it.
UPDATE api_keys SET scopes = scopes || '{codes:read}'
WHERE scopes @> '{books:write,books:read,codes:write,coupons:assign,coupons:redeem,coupons:read}'
  AND NOT scopes @> '{codes:read}';
