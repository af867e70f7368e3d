//! The bounds that the CSI specification sets on every request ("Size Limits"), and on sizes.
//! Whether an object exists is not asked here: required fields come first, then existence, then
//! the rest.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use tonic::Status;

/// Bytes of a text in a request.
pub(crate) const TEXT_BYTES_MAX: usize = 128;
/// Bytes of a map in a request, keys and values together.
const MAP_BYTES_MAX: usize = 4096;
/// Bytes of a list of texts in a request.
const LIST_BYTES_MAX: usize = 4096;
/// Sizes that a volume can have: 4 KiB to 64 TiB.
pub(crate) const SIZES: RangeInclusive<u64> = 4096..=64 << 40;
/// Sizes are multiples of this: the smallest sector.
pub(crate) const SIZE_UNIT: u64 = 512;

/// Checks a text that must be there, such as an id.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn required(field: &str, text: &str) -> Result<(), Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is missing")));
    }
    optional(field, text)
}

/// Checks a text that may be empty.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn optional(field: &str, text: &str) -> Result<(), Status> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "{field} has {} bytes, at most {TEXT_BYTES_MAX} are possible",
            text.len()
        )));
    }
    Ok(())
}

/// Checks the name of an object that is to be made.
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
    if bytes > MAP_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "{field} has {bytes} bytes, at most {MAP_BYTES_MAX} are possible"
        )));
    }
    Ok(())
}

/// Checks the size of a list of texts.
///
/// # Errors
/// INVALID_ARGUMENT, naming the field.
pub(crate) fn list(field: &str, texts: &[String]) -> Result<(), Status> {
    let bytes: usize = texts.iter().map(String::len).sum();
    if bytes > LIST_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "{field} has {bytes} bytes, at most {LIST_BYTES_MAX} are possible"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_and_are_named() {
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
