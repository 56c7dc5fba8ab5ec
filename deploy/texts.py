"""What the page says, in both languages, and how it shows text of others. Called by app.py and its pages."""

import re

import streamlit as st

PAGES = {  # task of its models, icon
    "chat": ("text-generation", ":material/chat:"),
    "summarize": ("summarization", ":material/short_text:"),
    "ask": ("question-answering", ":material/quick_reference_all:"),
    "fill": ("fill-mask", ":material/match_word:"),
    "classify": ("text-classification", ":material/category:"),
    "model": (None, ":material/monitoring:"),
    "runs": (None, ":material/leaderboard:"),
}
TRAINED_BY = {"summarization": "summarize_t5", "question-answering": "qa_squad", "fill-mask": "mlm_bert"}
TRAINED_BY |= {"text-classification": "classify_bert"}
TEXTS = {
    "chat": ("Chat", "Trò chuyện"),
    "summarize": ("Summarize", "Tóm tắt"),
    "ask": ("Ask a text", "Hỏi văn bản"),
    "fill": ("Fill the blank", "Điền từ"),
    "classify": ("Sort a text", "Phân loại"),
    "model": ("Model", "Mô hình"),
    "runs": ("All runs", "Các lần chạy"),
    # The side bar
    "which": ("Model", "Mô hình"),
    "which_help": (
        "A run in outputs/, a model of the Hub (org/name), or pypi:name. Type any other name.",
        "Chọn một mô hình bạn đã huấn luyện trong outputs/, hoặc gõ tên một mô hình trên Hub (org/name) hay pypi:name.",
    ),
    "loading": ("Loading {}", "Đang tải {}"),
    "no_model": (
        "No model for this yet. Train one: `accelerate launch tasks/{}/train.py`, or type the name of one in the side bar.",
        "Chưa có mô hình nào cho việc này. Hãy huấn luyện một mô hình bằng lệnh `accelerate launch tasks/{}/train.py`, hoặc gõ "
        "tên mô hình ở thanh bên.",
    ),
    "not_offered": ("This model is not one of those offered here.", "Trang này không cung cấp mô hình đó."),
    "exposed": (
        "This page can be reached from other machines: TASKBOOK_MODELS has to name the models that may be chosen. Set it and "
        "start again, or start without --server.address.",
        "Các máy khác có thể truy cập trang này, nên cần liệt kê trong TASKBOOK_MODELS những mô hình được phép dùng. Hãy đặt "
        "biến này rồi chạy lại, hoặc chạy mà không có --server.address.",
    ),
    "failed": ("Something went wrong; please try again.", "Đã có lỗi, vui lòng thử lại."),
    # Chat
    "hello": ("What shall we talk about?", "Hôm nay mình nói chuyện gì nhỉ?"),
    "hello_more": (
        "Everything runs on this machine. Small models make things up: check what matters.",
        "Mọi thứ đều chạy trên máy này. Mô hình nhỏ có thể bịa đặt: điều gì quan trọng hãy kiểm tra lại.",
    ),
    "starters": (
        "What do you do on a rainy day?|Tell me about the moon.|Plan a small party.",
        "Trời mưa thì bạn thường làm gì?|Kể cho tôi nghe về mặt trăng.|Giúp tôi lên kế hoạch cho một bữa tiệc nhỏ.",
    ),
    "say": ("Write a message", "Nhập tin nhắn"),
    "stop": ("Stop", "Dừng"),
    "again": ("Regenerate", "Trả lời lại"),
    "edit": ("Edit", "Sửa"),
    "edit_more": (
        "What follows is replaced by a new reply.",
        "Phần trò chuyện phía sau sẽ được thay bằng câu trả lời mới.",
    ),
    "send": ("Send", "Gửi"),
    "cancel": ("Cancel", "Hủy"),
    "clear": ("Clear the chat", "Xóa cuộc trò chuyện"),
    "save_messages": ("Save as JSON", "Lưu dạng JSON"),
    "save_messages_help": (
        "One line with all messages: `tasks/chat_sft` can train on it.",
        "Một dòng chứa toàn bộ tin nhắn, có thể dùng làm dữ liệu huấn luyện cho `tasks/chat_sft`.",
    ),
    "save_markdown": ("Save as Markdown", "Lưu dạng Markdown"),
    "chat_with": ("Chat with {}", "Trò chuyện với {}"),
    "user": ("You", "Bạn"),
    "assistant": ("Model", "Mô hình"),
    "system": ("System prompt", "Lời nhắc hệ thống"),
    "sampling": ("Sampling", "Cách sinh văn bản"),
    "temperature": ("Temperature", "Nhiệt độ (temperature)"),
    "top_p": ("Top-p", "Top-p"),
    "penalty": ("Repetition penalty", "Mức phạt khi lặp từ"),
    "max_tokens": ("Most new tokens", "Số token tối đa mỗi lần trả lời"),
    "compare": ("Side by side with the base model", "So sánh với mô hình gốc"),
    "tuned": ("Trained", "Đã huấn luyện"),
    "base": ("Base", "Mô hình gốc"),
    "speed": ("{} tokens · {:.1f} tokens/s", "{} token · {:.1f} token/giây"),
    "stopped": ("stopped", "đã dừng"),
    "nothing": ("(no text)", "(không có nội dung)"),
    # Documents
    "documents": ("Answer from documents", "Trả lời dựa trên tài liệu"),
    "no_documents": ("None: the model alone", "Không dùng tài liệu"),
    "own_files": ("Your own files", "Tệp của bạn"),
    "not_indexed": (
        "These documents are not indexed yet. Click anywhere in a moment.",
        "Tài liệu này chưa được lập chỉ mục. Hãy thử lại sau giây lát.",
    ),
    "passages": ("{:,} passages", "{:,} đoạn"),
    "passages_so_far": (
        "{:,} passages so far: not all documents are indexed yet.",
        "Đã có {:,} đoạn, việc lập chỉ mục chưa xong.",
    ),
    "indexing": ("Reading and indexing", "Đang đọc và lập chỉ mục"),
    "files_long": (
        "{}: left out, as all files together would have more than {:,} characters.",
        "{}: bỏ qua tệp này, vì tổng độ dài các tệp sẽ vượt quá {:,} ký tự.",
    ),
    "hello_documents": ("What would you like to know?", "Bạn muốn biết điều gì?"),
    "hello_documents_more": (
        "Each question is answered from the passages that come nearest to it, and they are shown. Small models make things up "
        "even so: look at the sources.",
        "Mỗi câu hỏi được trả lời dựa trên những đoạn gần nghĩa nhất, và các đoạn đó được hiện kèm theo. Mô hình nhỏ vẫn có thể "
        "bịa đặt, nên hãy đối chiếu với nguồn.",
    ),
    "documents_silent": ("The documents do not say.", "Tài liệu không đề cập điều này."),
    "sources": ("Passages that the model was given:", "Các đoạn mà mô hình đã đọc:"),
    "nearest": ("The nearest passages:", "Các đoạn gần nghĩa nhất:"),
    "source_line": ("{}, line {:,}", "{}, dòng {:,}"),
    "open_source": ("Open", "Mở"),
    # Texts and files
    "text": ("Text", "Văn bản"),
    "open_file": ("Open a file", "Mở tệp"),
    "file_types": (".txt, .md or .pdf, up to {} MB", "Tệp .txt, .md hoặc .pdf, tối đa {} MB"),
    "file_kind": ("{}: only .txt, .md and .pdf can be opened.", "{}: chỉ mở được tệp .txt, .md và .pdf."),
    "file_large": ("{}: larger than {} MB.", "{}: tệp lớn hơn {} MB."),
    "file_long": (
        "{}: more than {:,} characters. Open a part of it.",
        "{}: dài hơn {:,} ký tự. Hãy mở từng phần của tệp.",
    ),
    "file_empty": ("{}: there is no text in it.", "{}: tệp không có nội dung."),
    "file_binary": ("{}: this is not a text file.", "{}: đây không phải là tệp văn bản."),
    "file_encoding": (
        "{}: not saved in UTF-8 or UTF-16, so that its letters would be guessed. Save it as UTF-8 and open it again.",
        "{}: tệp không được lưu ở dạng UTF-8 hay UTF-16 nên chữ có thể bị đọc sai. Hãy lưu lại ở dạng UTF-8 rồi mở lại.",
    ),
    "file_locked": (
        "{}: the PDF opens only with a password. Save it without one.",
        "{}: tệp PDF có mật khẩu. Hãy lưu lại một bản không đặt mật khẩu.",
    ),
    "file_scanned": (
        "{}: the PDF holds pictures of pages and no text. Run text recognition (OCR) on it first.",
        "{}: tệp PDF chỉ có ảnh chụp trang giấy, không có chữ. Hãy chạy nhận dạng chữ (OCR) trước.",
    ),
    "file_part_scanned": (
        "{}: pages that are pictures without text, left out: {:,}. Run text recognition (OCR) on it to read them, too.",
        "{}: số trang chỉ có ảnh, không có chữ và đã bị bỏ qua: {:,}. Hãy chạy nhận dạng chữ (OCR) để đọc cả những trang đó.",
    ),
    "file_damaged": ("{}: the PDF is damaged and cannot be read.", "{}: tệp PDF bị hỏng, không đọc được."),
    "file_slow": (
        "{}: reading the PDF took too long. Open a part of it, or save its text.",
        "{}: đọc tệp PDF mất quá nhiều thời gian. Hãy mở từng phần, hoặc lưu riêng phần chữ.",
    ),
    # Summaries, answers, blanks, labels
    "length": ("Most tokens of the summary", "Số token tối đa của bản tóm tắt"),
    "summary": ("Summary", "Bản tóm tắt"),
    "reference": ("Reference summary, to compare with (optional)", "Bản tóm tắt mẫu để đối chiếu (không bắt buộc)"),
    "question": ("Question", "Câu hỏi"),
    "find": ("Find the answer", "Tìm câu trả lời"),
    "answer": ("Answer", "Trả lời"),
    "no_answer": ("The text does not say.", "Văn bản không đề cập điều này."),
    "confidence": (
        "Confidence that the text answers this: {:.0%}",
        "Độ tin cậy rằng văn bản có câu trả lời: {:.0%}",
    ),
    "sentence": ("Sentence with ___ where a word is missing", "Câu có chỗ trống, viết là ___"),
    "sentences": (
        "She opened the window because the room was too ___.|Return the number of ___ in the list.",
        "Trời sắp mưa, nhớ mang theo ___ nhé.|Hàm này trả về số ___ trong danh sách.",
    ),
    "guess": ("Guess", "Đoán từ"),
    "sort": ("Find its label", "Tìm nhãn"),
    # The model page
    "task": ("Task", "Tác vụ"),
    "artifact": ("Form", "Định dạng"),
    "context": ("Context", "Ngữ cảnh"),
    "tokens": ("{:,} tokens", "{:,} token"),
    "from": ("Trained from", "Huấn luyện từ"),
    "data": ("Data", "Dữ liệu"),
    "verdict": ("Did it help?", "Huấn luyện có hiệu quả không?"),
    "metrics": ("Metrics", "Chỉ số đánh giá"),
    "metrics_more": (
        "On {:,} test rows that were not trained on; in parentheses 95 % intervals.",
        "Đo trên {:,} dòng kiểm tra không dùng để huấn luyện; trong ngoặc là khoảng tin cậy 95 %.",
    ),
    "from_to": ("{} to {}", "{} đến {}"),
    "metric": ("Metric", "Chỉ số"),
    "lower": ("lower is better", "càng thấp càng tốt"),
    "trained": ("trained", "đã huấn luyện"),
    "untrained": ("before", "trước huấn luyện"),
    "baseline": ("trivial baseline", "mốc đơn giản"),
    "cost": ("Cost", "Chi phí"),
    "training_time": ("Training", "Huấn luyện"),
    "whole_time": ("Whole run", "Toàn bộ"),
    "minutes": ("{:.1f} min", "{:.1f} phút"),
    "memory": ("Peak memory", "Bộ nhớ cao nhất"),
    "device_hours": ("Device hours", "Giờ máy"),
    "steps": ("{:,} steps", "{:,} bước"),
    "loss": ("Loss", "Mất mát (loss)"),
    "samples": ("Samples from the test split", "Mẫu từ tập kiểm tra"),
    "sample_prompt": ("Prompt", "Đầu vào"),
    "sample_base": ("Before", "Trước"),
    "sample_trained": ("After", "Sau"),
    "sample_reference": ("Reference", "Đáp án mẫu"),
    "artifacts": ("Forms: size and speed", "Các định dạng: kích thước và tốc độ"),
    "latency": ("ms for one", "ms cho một lần"),
    "per_second": ("tokens or answers/s", "token hoặc câu trả lời/giây"),
    "settings": ("Settings of the run", "Thiết lập huấn luyện"),
    "card": ("Card", "Thẻ mô hình"),
    # All runs
    "no_runs": (
        "No finished run in outputs/ yet. Train one: `accelerate launch tasks/chat_sft/train.py`.",
        "Trong outputs/ chưa có lần chạy nào hoàn tất. Hãy huấn luyện một mô hình: `accelerate launch tasks/chat_sft/train.py`.",
    ),
    "runs_more": (
        "Numbers of the test split. Green is the best of the runs that were scored on the same rows; others are not comparable.",
        "Các số liệu trên tập kiểm tra. Màu xanh là tốt nhất trong những lần chạy được chấm trên cùng các dòng; còn lại không so "
        "sánh được với nhau.",
    ),
    "with_intervals": ("With intervals and baselines", "Kèm khoảng tin cậy và các mốc so sánh"),
    "curves_of": ("Loss curves of", "Đường loss của"),
    "step": ("optimizer step", "bước tối ưu"),
    "two_runs": ("What differs between the two", "Hai lần chạy khác nhau ở đâu"),
    "choose_two": (
        "Choose exactly two runs to see what differs between them, row by row.",
        "Chọn đúng hai lần chạy để xem chúng khác nhau ở đâu, theo từng dòng.",
    ),
    "hardware": ("Hardware", "Phần cứng"),
    "date": ("Date", "Ngày"),
    "minutes_format": ("%.1f min", "%.1f phút"),
    "opens_model": ("Open", "Mở"),
    "no_run": (
        "This folder holds a model and no results of a run.",
        "Thư mục này chỉ có mô hình, không có kết quả huấn luyện.",
    ),
}

# Of what a run wrote down in English: its verdict (shared/publish/compare.py), the names of its metrics and baselines
SENTENCES_OF_RUNS = {
    r"test (\w+) (\S+) -> (\S+)": r"\1 trên tập kiểm tra \2 -> \3",
    r"95 % interval of the difference in (\w+) (\S+) to ([^\s)]+)": r"khoảng tin cậy 95 % của mức thay đổi \1: từ \2 đến \3",
    r"better on (\S+) % of (\S+) rows": r"tốt hơn ở \1 % trong số \2 dòng",
    r"among the first (\d+)(?: passages)?": r"nằm trong \1 đoạn đầu",
}
WORDS_OF_RUNS = {  # in lower case
    "yes": "có",
    "no": "không",
    "not clearly": "chưa rõ",
    "not clearly better than": "chưa rõ có tốt hơn",
    "better than": "tốt hơn",
    "worse than": "kém hơn",
    "and": "và",
    "the interval includes zero.": "khoảng này chứa số 0.",
    "fewer than 10 rows show nothing.": "ít hơn 10 dòng thì chưa kết luận được gì.",
    "both models score the same in every row: nothing was learned, or the adapter is not active.": (
        "hai mô hình có điểm bằng nhau ở mọi dòng: mô hình chưa học được gì, hoặc adapter không hoạt động."
    ),
    "untrained": "mô hình chưa huấn luyện",
    "linear classifier": "bộ phân loại tuyến tính",
    "most frequent token": "token hay gặp nhất",
    "most frequent label": "nhãn hay gặp nhất",
    "most frequent answer": "câu trả lời hay gặp nhất",
    "random passages": "đoạn ngẫu nhiên",
    "random": "ngẫu nhiên",
    "silent": "không trả lời",
    "position": "vị trí hay gặp nhất",
    "longer reply": "câu trả lời dài hơn",
    "full trigram": "trigram của toàn bộ văn bản",
    "loss (nats)": "mất mát (loss, nat)",
    "bits per byte": "số bit mỗi byte",
    "accuracy": "độ chính xác",
    "accuracy of the five most likely": "độ chính xác khi xét năm dự đoán đầu",
    "exact match": "trùng khớp hoàn toàn",
    "of questions with an answer": "của các câu hỏi có đáp án",
    "of questions without an answer": "của các câu hỏi không có đáp án",
    "at the best threshold for these rows": "ở ngưỡng tốt nhất cho các dòng này",
    "mean reciprocal rank": "nghịch đảo thứ hạng trung bình (MRR)",
    "right passage": "đoạn đúng",
    "right passage first": "đoạn đúng đứng đầu",
    "right document": "tài liệu đúng",
    "right document first": "tài liệu đúng đứng đầu",
    "together with bm25": "kết hợp với BM25",
    "margin": "khoảng cách điểm",
    "margin of chosen over rejected replies (nats per token)": (
        "khoảng cách điểm giữa câu trả lời được chọn và bị loại (nat mỗi token)"
    ),
    "recall at 5": "độ phủ (recall) ở 5 đoạn đầu",
}


# The longest first: some begin as others do
A_WORD_OF_RUNS = re.compile(
    rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(WORDS_OF_RUNS, key=len, reverse=True)))})(?!\w)", re.IGNORECASE
)


def of_run(text: str) -> str:
    """What a run wrote down, in the language of the session; a name that nobody foresaw stays as it is."""
    if st.session_state.get("language") != "vi":
        return text
    for pattern, words in SENTENCES_OF_RUNS.items():
        text = re.sub(pattern, words, text)

    def translated(found: re.Match) -> str:
        words = WORDS_OF_RUNS[found[0].lower()]
        return words[0].upper() + words[1:] if found[0][0].isupper() else words

    return A_WORD_OF_RUNS.sub(translated, text)


def t(key: str, *values) -> str:
    """A label in the language of the session."""
    return TEXTS[key][st.session_state.get("language") == "vi"].format(*values)


def as_markdown(text: str) -> str:
    """What a model or a card says, for st.markdown: no image, no formula out of two dollar signs, no icons or colours."""
    text = text.replace("![", "!\u2060[")  # an image would be fetched from wherever it says
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if i % 2 else re.sub(r"\$|:(?=[\w/-]+[:\[])", r"\\\g<0>", part) for i, part in enumerate(parts))


def literally(text: str) -> str:
    """Text whose every character is shown as it is by st.markdown."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~$:&])", r"\\\1", text).replace("\n", "  \n")


def with_mark(text: str, start: int, end: int) -> str:
    """As `literally`, with a mark from `start` to `end`: no blanks around it, no empty line in it, which would end it."""
    middle = f":green-background[{literally(text[start:end])}]" if start < end else ""
    return literally(text[:start]) + middle + literally(text[end:])
