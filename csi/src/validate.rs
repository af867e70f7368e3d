//! The limits that the CSI specification sets for every request ("Size Limits"), and the limits of
//! sizes. Calls check required fields first, then whether the object exists, then the rest; nothing
//! here looks up an object.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use tonic::Status;

/// Maximum length of a text in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = 128;
/// Maximum length of a map in bytes, keys and values together.
const MAP_BYTES_MAX: usize = 4096;
/// Maximum length of a list of texts in bytes.
const LIST_BYTES_MAX: usize = 4096;
/// Valid sizes of a volume: 4 KiB to 64 TiB.
pub(crate) const SIZES: RangeInclusive<u64> = 4096..=64 << 40;
/// Sizes are multiples of the smallest sector.
pub(crate) const SIZE_UNIT: u64 = 512;

/// The error for a required field that is missing.
pub(crate) fn missing(field: &str) -> Status {
    Status::invalid_argument(format!("{field} is missing"))
}

/// Checks the length of a field.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn length(field: &str, bytes: usize, max: usize) -> Result<(), Status> {
    if bytes > max {
        let text = format!("{field} has {bytes} bytes, the limit is {max}");
        return Err(Status::invalid_argument(text));
    }
    Ok(())
}

/// Converts a number that must not be negative.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn not_negative<S, U>(field: &str, number: S) -> Result<U, Status>
where
    S: Copy + std::fmt::Display,
    U: TryFrom<S>,
{
    let negative = |_| Status::invalid_argument(format!("{field} = {number} is negative"));
    U::try_from(number).map_err(negative)
}

/// Checks a required text, such as an id.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn required(field: &str, text: &str) -> Result<(), Status> {
    if text.is_empty() {
        return Err(missing(field));
    }
    optional(field, text)
}

/// Checks a text that may be empty.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn optional(field: &str, text: &str) -> Result<(), Status> {
    length(field, text.len(), TEXT_BYTES_MAX)
}

/// Checks the name of a new object.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn name(field: &str, text: &str) -> Result<(), Status> {
    required(field, text)?;
    if text.chars().any(char::is_control) {
        return Err(Status::invalid_argument(format!("{field} contains control characters")));
    }
    Ok(())
}

/// Checks the size of a map.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn map(field: &str, map: &BTreeMap<String, String>) -> Result<(), Status> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    length(field, bytes, MAP_BYTES_MAX)
}

/// Checks the size of a list of texts.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn list(field: &str, texts: &[String]) -> Result<(), Status> {
    let bytes: usize = texts.iter().map(String::len).sum();
    length(field, bytes, LIST_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_errors_name_the_field() {
        required("id", &"x".repeat(128)).unwrap();
        assert!(required("id", "").unwrap_err().message().contains("id is missing"));
        assert!(required("id", &"x".repeat(129)).unwrap_err().message().contains("129"));
        optional("token", "").unwrap();
        name("name", "\u{e4} /..").unwrap();
        assert_eq!(name("name", "a\nb").unwrap_err().code(), tonic::Code::InvalidArgument);
        let pair = |bytes: usize| BTreeMap::from([("k".to_owned(), "v".repeat(bytes))]);
        map("parameters", &pair(4095)).unwrap();
        assert!(map("parameters", &pair(4096)).is_err());
        list("flags", &["f".repeat(4095), "f".to_owned()]).unwrap();
        assert!(list("flags", &["f".repeat(4095), "fg".to_owned()]).is_err());
    }
}
