//! Screen pictures as PNG files.

use anyhow::Result;
use pdm::connector::Frame;

/// Largest side a picture is scaled to.
const MAX_SIDE: u32 = 8192;

/// The frame as a PNG file, scaled to `width` by `height` (0: its own size) by the nearest pixel.
pub fn png(frame: &Frame, width: u32, height: u32) -> Result<Vec<u8>> {
    let width = if width == 0 { frame.width } else { width.min(MAX_SIDE) };
    let height = if height == 0 { frame.height } else { height.min(MAX_SIDE) };
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    for y in 0..u64::from(height) {
        let row = y * u64::from(frame.height) / u64::from(height) * u64::from(frame.width);
        for x in 0..u64::from(width) {
            let at = (row + x * u64::from(frame.width) / u64::from(width)) as usize * 4;
            rgb.extend([frame.pixels[at + 2], frame.pixels[at + 1], frame.pixels[at]]);
        }
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb)?;
    writer.finish()?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_keeps_its_colors_when_scaled() {
        let frame = Frame { width: 2, height: 1, pixels: vec![1, 2, 3, 0, 4, 5, 6, 0] };
        let data = png(&frame, 4, 2).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(data)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, [3, 2, 1, 3, 2, 1, 6, 5, 4, 6, 5, 4].repeat(2));
    }
}
