//! The order of names for people: numbers in them count as numbers, so that c-2 is before c-10.

use std::cmp::Ordering;

/// Compares two names.
pub(crate) fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.as_bytes(), b.as_bytes());
    while let (Some(x), Some(y)) = (left.first(), right.first()) {
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            compare_numbers(&mut left, &mut right)
        } else {
            (left, right) = (&left[1..], &right[1..]);
            x.cmp(y)
        };
        if order.is_ne() {
            return order;
        }
    }
    // Equal but for leading zeros, or one is the beginning of the other.
    left.len().cmp(&right.len()).then_with(|| a.cmp(b))
}

/// Compares the numbers that two texts begin with, and goes behind them. They can be of any length.
fn compare_numbers(left: &mut &[u8], right: &mut &[u8]) -> Ordering {
    let (x, y) = (number(left), number(right));
    x.len().cmp(&y.len()).then_with(|| x.cmp(y))
}

/// Takes the digits at the start of `text`, without leading zeros.
fn number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|&&byte| byte == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_as_numbers() {
        let sorted = [
            "C",
            "a",
            "c",
            "c-",
            "c-1",
            "c-1a",
            "c-02",
            "c-2",
            "c-10",
            "c-10-2",
            "c-10-11",
            "c-100",
            "c1",
            "c99999999999999999999999",
            "c100000000000000000000000",
            "d",
        ];
        let mut names = sorted;
        names.reverse();
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, sorted);
        assert!(natural("c-01", "c-1").is_ne(), "only equal names are equal");
    }
}
