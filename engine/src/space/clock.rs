//! A bounded cache with the CLOCK policy: what was used since the hand last passed stays. Nothing
//! depends on the order of a hash map, so a run from a seed repeats.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// A fast hasher for small integer keys (multiply and rotate); not for keys that strangers choose.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value.cast_unsigned() as u64);
    }
}

type Index<K> = HashMap<K, usize, BuildHasherDefault<KeyHasher>>;

struct Slot<K, V> {
    key: K,
    value: V,
    used: bool,
}

/// At most `capacity` values, found by key.
pub struct Clock<K, V> {
    capacity: usize,
    index: Index<K>,
    slots: Vec<Slot<K, V>>,
    hand: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Clock<K, V> {
    /// An empty cache; a capacity of 0 is taken as 1.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), index: Index::default(), slots: Vec::new(), hand: 0 }
    }

    /// The value under `key`, marked as used.
    pub fn get(&mut self, key: K) -> Option<V> {
        let slot = &mut self.slots[*self.index.get(&key)?];
        slot.used = true;
        Some(slot.value.clone())
    }

    /// Whether `key` is present.
    #[must_use]
    pub fn contains(&self, key: K) -> bool {
        self.index.contains_key(&key)
    }

    /// Puts `value` under `key`, in the place of an older one or of something unused.
    pub fn put(&mut self, key: K, value: V) {
        if let Some(&at) = self.index.get(&key) {
            self.slots[at].value = value;
            return;
        }
        if self.slots.len() < self.capacity {
            self.index.insert(key, self.slots.len());
            self.slots.push(Slot { key, value, used: false });
            return;
        }
        while std::mem::replace(&mut self.slots[self.hand].used, false) {
            self.hand = (self.hand + 1) % self.slots.len();
        }
        self.index.remove(&self.slots[self.hand].key);
        self.index.insert(key, self.hand);
        self.slots[self.hand] = Slot { key, value, used: false };
        self.hand = (self.hand + 1) % self.slots.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_is_used_and_stays_bounded() {
        let mut clock = Clock::new(4);
        for key in 0..4u64 {
            clock.put(key, key * 10);
        }
        assert_eq!(clock.get(2), Some(20));
        for key in 4..7u64 {
            clock.put(key, key * 10);
        }
        assert_eq!(clock.get(2), Some(20), "used, so kept");
        assert_eq!(clock.slots.len(), 4);
        clock.put(2, 21);
        assert_eq!(clock.get(2), Some(21));
        assert!(!clock.contains(0));
    }
}
