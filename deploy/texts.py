"""What the page says, in both languages. Called by app.py."""

PAGES = {  # task of its models, icon
    "chat": ("text-generation", ":material/chat:"),
    "summarize": ("summarization", ":material/short_text:"),
    "ask": ("question-answering", ":material/quick_reference_all:"),
    "fill": ("fill-mask", ":material/match_word:"),
    "classify": ("text-classification", ":material/category:"),
    "model": (None, ":material/monitoring:"),
}
TEXTS = {
    "chat": ("Chat", "Trò chuyện"),
    "summarize": ("Summarize", "Tóm tắt"),
    "ask": ("Ask a text", "Hỏi đáp"),
    "fill": ("Fill the blank", "Điền từ"),
    "classify": ("Sort a text", "Phân loại"),
    "model": ("Model", "Mô hình"),
    "which": ("Model", "Mô hình"),
    "which_help": (
        "A run in outputs/, a model of the Hub (org/name), or pypi:name. Type any other name.",
        "Một lần huấn luyện trong outputs/, một mô hình trên Hub (org/name), hoặc pypi:name. Có thể gõ tên khác.",
    ),
    "loading": ("Loading {}", "Đang nạp {}"),
    "no_model": (
        "No model for this yet. Train one: `accelerate launch tasks/{}/train.py`, or type the name of one in the side bar.",
        "Chưa có mô hình cho việc này. Hãy huấn luyện: `accelerate launch tasks/{}/train.py`, hoặc gõ tên ở thanh bên.",
    ),
    "hello": ("What shall we talk about?", "Ta nói chuyện gì nhé?"),
    "hello_more": (
        "Everything runs on this machine. Small models make things up: check what matters.",
        "Mọi thứ chạy trên máy này. Mô hình nhỏ hay bịa: hãy kiểm tra điều quan trọng.",
    ),
    "starters": (
        "What do you do on a rainy day?|Tell me about the moon.|Plan a small party.",
        "Trời mưa bạn làm gì?|Kể tôi nghe về mặt trăng.|Tổ chức một bữa tiệc nhỏ.",
    ),
    "say": ("Write a message", "Nhập tin nhắn"),
    "stop": ("Stop", "Dừng"),
    "again": ("Regenerate", "Tạo lại"),
    "edit": ("Edit", "Sửa"),
    "send": ("Send", "Gửi"),
    "cancel": ("Cancel", "Hủy"),
    "clear": ("Clear the chat", "Xóa hội thoại"),
    "system": ("System prompt", "Chỉ dẫn hệ thống"),
    "sampling": ("Sampling", "Cách sinh"),
    "temperature": ("Temperature", "Nhiệt độ"),
    "top_p": ("Top-p", "Top-p"),
    "penalty": ("Repetition penalty", "Phạt lặp"),
    "max_tokens": ("Most new tokens", "Số token mới tối đa"),
    "compare": ("Side by side with the base model", "So với mô hình gốc"),
    "tuned": ("Trained", "Đã huấn luyện"),
    "base": ("Base", "Gốc"),
    "speed": ("{} tokens · {:.1f} tokens/s", "{} token · {:.1f} token/giây"),
    "stopped": ("stopped", "đã dừng"),
    "nothing": ("(no text)", "(không có chữ)"),
    "text": ("Text", "Văn bản"),
    "length": ("Most tokens of the summary", "Số token tối đa của bản tóm tắt"),
    "summary": ("Summary", "Bản tóm tắt"),
    "reference": ("Reference summary, to compare with (optional)", "Bản tóm tắt mẫu để so sánh (không bắt buộc)"),
    "question": ("Question", "Câu hỏi"),
    "find": ("Find the answer", "Tìm câu trả lời"),
    "answer": ("Answer", "Trả lời"),
    "no_answer": ("The text does not say.", "Văn bản không nói điều này."),
    "confidence": ("Confidence that the text answers this: {:.0%}", "Độ tin rằng văn bản có câu trả lời: {:.0%}"),
    "sentence": ("Sentence with ___ where a word is missing", "Câu có ___ ở chỗ thiếu từ"),
    "sort": ("Find its label", "Tìm nhãn"),
    "exposed": (
        "This page can be reached from other machines: TASKBOOK_MODELS has to name the models that may be chosen. Set it and "
        "start again, or start without --server.address.",
        "Máy khác truy cập được trang này: TASKBOOK_MODELS phải nêu các mô hình được chọn. Hãy đặt biến đó rồi chạy lại, hoặc "
        "chạy không có --server.address.",
    ),
    "guess": ("Guess", "Đoán"),
    "task": ("Task", "Việc"),
    "artifact": ("Form", "Dạng"),
    "context": ("Context", "Ngữ cảnh"),
    "metrics": ("Metrics", "Chỉ số"),
    "metric": ("Metric", "Chỉ số"),
    "trained": ("trained", "đã huấn luyện"),
    "untrained": ("base", "gốc"),
    "loss": ("Loss", "Hàm mất mát"),
    "artifacts": ("Forms: size and speed", "Các dạng: kích thước và tốc độ"),
    "latency": ("ms for one", "ms cho một lần"),
    "per_second": ("tokens or answers/s", "token hoặc câu trả lời/giây"),
    "card": ("Card", "Thẻ mô hình"),
    "failed": ("Something went wrong; please try again.", "Có lỗi; xin thử lại."),
}
TRAINED_BY = {"summarization": "summarize_t5", "question-answering": "qa_squad", "fill-mask": "mlm_bert"}
TRAINED_BY |= {"text-classification": "classify_bert"}
EXAMPLE = """\
Split the text into a list of words.

Parameters:
sep : str, default: None
The delimiter; runs of white space where it is None.
maxsplit : int, default: -1
The largest number of splits to do.

Raises:
ValueError
If the delimiter is empty."""  # a docstring, which is what the laptop runs learn
